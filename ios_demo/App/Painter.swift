import CoreML
import EdgeSD
import Foundation
import os

/// The model and the run in progress, off the main thread. One model is open at a time.
actor Painter {
    enum Event: Sendable {
        case compiling(done: Int, total: Int)
        case step(row: Int, rows: Int, preview: NDArray<UInt8>?, decision: Decision?, changes: [Change])
    }

    private(set) var opened: (bundle: ModelBundle, pipeline: Pipeline)?
    private var session: ComponentSession?
    private var run: Run?
    private var governor: PolicyRun?
    private let cache = PromptCache(folder: Painter.caches.appendingPathComponent("prompts"))

    static let caches = FileManager.default.urls(for: .cachesDirectory, in: .userDomainMask)[0]
    private static let paused = Library.support.appendingPathComponent("paused-run")

    /// Checks the bundle, compiles what is not compiled yet, opens the pipeline.
    func open(_ folder: URL, report: @escaping @Sendable (Event) async -> Void) async throws -> Pipeline {
        if let opened, opened.bundle.folder == folder.resolvingSymlinksInPath() { return opened.pipeline }
        close()
        let bundle = try ModelBundle.read(folder, receipts: Painter.caches.appendingPathComponent("receipts"))
        guard bundle.manifest.target == "coreml" else {
            throw EdgesdError(.request, "a bundle for \(bundle.manifest.target)", "coreml", "Package the model with --target coreml")
        }
        let models = CoreMLModels(bundle, compiled: Library.support.appendingPathComponent("compiled"))
        try await models.compile { done, total in await report(.compiling(done: done, total: total)) }
        let session = try ComponentSession(bundle, form: Painter.form(bundle), oneAtATime: Painter.isTight(bundle), open: models.open)
        let pipeline = try Pipeline(bundle, session)
        (self.session, opened) = (session, (bundle, pipeline))
        return pipeline
    }

    /// The form made for the Neural Engine, where the bundle has it.
    private static func form(_ bundle: ModelBundle) -> String? {
        let forms = bundle.manifest.components.flatMap(\.variants).map(\.axes.form)
        return forms.contains("split_einsum") ? "split_einsum" : nil
    }

    /// Whether all components at once would take more than half of the memory this app may have.
    private static func isTight(_ bundle: ModelBundle) -> Bool {
        bundle.manifest.files.reduce(0) { $0 + $1.bytes } > os_proc_available_memory() / 2
    }

    func close() { (opened, session, run) = (nil, nil, nil) }

    /// A new picture. policy: its name, nil = the settings as they are. Pauses that it asks for end at `pause`.
    func begin(_ settings: Settings, policy: String?, sense: @escaping @Sendable () -> DeviceState) throws {
        guard let (bundle, pipeline) = opened else { throw EdgesdError(.request, "no model", "an opened one", "Choose a model") }
        var settings = settings
        governor = nil
        if let policy {
            var limits = pipeline.limits(settings.sampler)
            limits.maxSteps = settings.numInferenceSteps
            limits.maxWidth = settings.width
            limits.maxGuidanceUntil = settings.guidanceUntil
            let made = PolicyRun(
                try bundle.policy(policy), limits: try limits.checked(), sense: sense,
                sleep: { seconds in
                    for _ in 0..<Int(seconds * 10) where !Task.isCancelled { Thread.sleep(forTimeInterval: 0.1) }
                },
                share: { pipeline.widths?.share($0) ?? 1 })
            let decision = try made.begin()
            settings.numInferenceSteps = decision.steps
            settings.width = decision.width
            settings.guidanceUntil = decision.guidanceUntil
            let calls = Double(decision.steps) * (1 + decision.guidanceUntil)
            if let better = pipeline.widths?.planSwitch(from: decision.width, limits: limits, calls: calls, freeBytes: sense().freeMemoryBytes) {
                (settings.width, settings.switchTo) = (better.first, better.then)
                made.planSwitch()
            }
            governor = made
        }
        run = try Run(pipeline, settings, cache: cache, governor: governor)
    }

    /// Rows until the picture is done or the task is cancelled; nil = cancelled, and `begin` or `proceed` may follow.
    func proceed(report: @escaping @Sendable (Event) async -> Void) async throws -> (Picture, [UInt8])? {
        guard let run, let pipeline = opened?.pipeline else { return nil }
        while let step = try run.next() {
            let small = try? preview(step.denoised, pipeline.spec.latent)
            await report(.step(row: step.row + 1, rows: step.table.rows, preview: small, decision: governor?.now, changes: run.log.changes))
            if Task.isCancelled { return nil }
        }
        let picture = try run.picture()
        try? FileManager.default.removeItem(at: Painter.paused)
        return (picture, Png.encode(picture.image, settings: picture.record(pipeline, decision: governor?.now)))
    }

    /// Keeps the run on disk: iOS may end an app that is not seen. The settings lie beside it.
    func keep() {
        guard let run else { return }
        try? run.saved.save(Painter.paused)
        try? Data(run.settings.json.dumped.utf8).write(to: Painter.paused.appendingPathExtension("json"), options: .atomic)
    }

    /// The run that `keep` left, of the opened model; nil where there is none that fits. A policy's changes so far stay.
    func resumeKept() -> Settings? {
        guard let pipeline = opened?.pipeline, let data = try? Data(contentsOf: Painter.paused.appendingPathExtension("json")),
            let settings = try? Settings(json: Json.parse([UInt8](data))), let saved = try? SavedRun.read(Painter.paused),
            let kept = try? Run(pipeline, settings, cache: cache, resume: saved)
        else { return nil }
        (run, governor) = (kept, nil)
        return settings
    }

    func forgetKept() {
        run = nil
        try? FileManager.default.removeItem(at: Painter.paused)
    }

    /// Gives memory back; what is needed loads again.
    func forgetMemory() {
        cache.forget()
        for component in opened?.bundle.manifest.components ?? [] { session?.unload(component.name) }
    }

    func selfTest(report: @escaping @Sendable (SelfTest.Result) -> Void) throws {
        guard let (bundle, pipeline) = opened else { throw EdgesdError(.request, "no model", "an opened one", "Choose a model") }
        try SelfTest(bundle).run(pipeline) { result in
            try Task.checkCancellation()
            report(result)
        }
    }
}
