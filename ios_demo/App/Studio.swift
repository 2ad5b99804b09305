import EdgeSD
import SwiftUI

/// What the screens show and the buttons do. Drawing itself is `Painter`'s.
@MainActor
final class Studio: ObservableObject {
    enum Phase: Equatable { case empty, opening(String), ready, drawing, paused, testing }

    @Published private(set) var phase = Phase.empty
    @Published private(set) var pipeline: Pipeline?
    @Published private(set) var bundle: ModelBundle?
    @Published var settings = PictureSettings(prompt: "a red circle above a blue square on a white background")
    @Published var policy: String? = "balanced"
    @Published private(set) var row = (done: 0, of: 1)
    @Published private(set) var preview: CGImage?
    @Published private(set) var decision: Decision?
    @Published private(set) var changes: [Change] = []
    @Published private(set) var picture: Picture?
    @Published private(set) var png: URL?
    @Published private(set) var results: [SelfTest.Result] = []
    @Published var problem: String?

    let sensors = Sensors()
    private let painter = Painter()
    private var task: Task<Void, Never>?
    private var background = UIBackgroundTaskIdentifier.invalid
    private var pausedByBackground = false
    private var started = 0

    func open(_ folder: URL) {
        guard task == nil else { return }
        phase = .opening("Checking \(folder.lastPathComponent)")
        start {
            let pipeline = try await self.painter.open(folder) { await self.show($0) }
            self.pipeline = pipeline
            self.bundle = await self.painter.opened?.bundle
            var settings = PictureSettings(prompt: self.settings.prompt, pipeline.spec)
            if let prepared = pipeline.preparedPrompts?.first { settings.prompt = prepared }
            self.settings = settings
            self.phase = .ready
            if let kept = await self.painter.resumeKept() {
                (self.settings, self.phase) = (kept, .paused)
            }
        }
    }

    func draw() {
        guard task == nil, pipeline != nil else { return }
        (phase, picture, png, preview, decision, changes, row) = (.drawing, nil, nil, nil, nil, [], (0, 1))
        let (settings, policy, latest) = (settings, policy, sensors.latest)
        start {
            try await self.painter.begin(settings, policy: policy) { latest.now() }
            try await self.finish()
        }
    }

    func pause() {
        phase = .paused
        task?.cancel()
    }

    func resume() {
        guard phase == .paused else { return }
        let before = task
        phase = .drawing
        start {
            await before?.value  // the row in progress ends first
            try await self.finish()
        }
    }

    func cancel() {
        let before = task
        before?.cancel()
        start {
            await before?.value
            await self.painter.forgetKept()
            self.phase = .ready
        }
    }

    func selfTest() {
        guard task == nil, pipeline != nil else { return }
        (phase, results) = (.testing, [])
        start {
            defer { self.phase = .ready }
            try await self.painter.selfTest { result in Task { @MainActor in self.results.append(result) } }
        }
    }

    /// Without a screen the GPU is not ours: the row in progress ends, the run is kept on disk, and goes on when seen.
    func sceneBecame(active: Bool, background isBackground: Bool) {
        if isBackground, phase == .drawing {
            pausedByBackground = true
            pause()
            background = UIApplication.shared.beginBackgroundTask { [weak self] in
                MainActor.assumeIsolated { self?.endBackground() }
            }
            let before = task
            Task {
                await before?.value
                await painter.keep()
                endBackground()
            }
        } else if active, pausedByBackground {
            pausedByBackground = false
            resume()
        }
    }

    func memoryWarning() {
        Task { await painter.forgetMemory() }  // between two rows: the painter is an actor
        if phase == .drawing { problem = "Memory is short: the model loads again for the next step." }
    }

    private func endBackground() {
        UIApplication.shared.endBackgroundTask(background)
        background = .invalid
    }

    private func finish() async throws {
        guard let (picture, data) = try await painter.proceed(report: { await self.show($0) }) else {
            if phase == .drawing { phase = .paused }
            return
        }
        let place = FileManager.default.temporaryDirectory.appendingPathComponent("edgesd-\(picture.settings.seed).png")
        try Data(data).write(to: place, options: .atomic)
        (self.picture, png, preview, phase) = (picture, place, cgImage(picture.image), .ready)
    }

    private func show(_ event: Painter.Event) {
        switch event {
        case .compiling(let done, let total):
            phase = .opening(done < total ? "Compiling part \(done + 1) of \(total), once" : "Opening")
        case .step(let done, let rows, let small, let decision, let changes):
            row = (done, rows)
            (self.decision, self.changes) = (decision, changes)
            if let small { preview = cgImage(small) }
        }
    }

    private func start(_ work: @escaping @MainActor () async throws -> Void) {
        started += 1
        let mine = started
        task = Task {
            do { try await work() } catch is CancellationError {} catch {
                problem = "\(error)"
                phase = pipeline == nil ? .empty : .ready
            }
            if started == mine { task = nil }
        }
    }
}

/// Pixels [H,W,3] as an image for the screen.
func cgImage(_ pixels: NDArray<UInt8>) -> CGImage? {
    guard let data = CGDataProvider(data: Data(pixels.values) as CFData) else { return nil }
    return CGImage(
        width: pixels.shape[1], height: pixels.shape[0], bitsPerComponent: 8, bitsPerPixel: 24, bytesPerRow: 3 * pixels.shape[1],
        space: CGColorSpace(name: CGColorSpace.sRGB)!, bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.none.rawValue),
        provider: data, decode: nil, shouldInterpolate: true, intent: .defaultIntent)
}
