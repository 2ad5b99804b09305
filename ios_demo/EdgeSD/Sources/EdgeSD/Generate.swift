import Foundation

/// A finished picture: pixels [H,W,3], latents as the sampler left them, UNet rows computed, text that did not fit, and
/// what a reader of the log should know.
public struct Picture: Sendable {
    public let image: NDArray<UInt8>
    public let latents: Tensor
    public let settings: Settings
    public let calls, stepsRun: Int
    public let truncated: String
    public let notes: [String]
}

/// What a run has done so far: with its state, all that a resumed run must know. steps, guidanceUntil, width: in force
/// now, nil = as the settings say.
public struct RunLog: Sendable {
    public var rowsRun = 0, calls = 0, draws = 0, bridges = 0
    public var steps: Int?
    public var guidanceUntil, width: Double?
    public var changes: [Change] = []
    public var last: (sample: Tensor, modelOutput: Tensor)?

    public init() {}

    var json: Json {
        .object(JsonObject([
            ("rows_run", .int(rowsRun)), ("calls", .int(calls)), ("draws", .int(draws)), ("bridges", .int(bridges)),
            ("steps", steps.map(Json.int) ?? .null), ("guidance_until", guidanceUntil.map(Json.double) ?? .null),
            ("width", width.map(Json.double) ?? .null), ("changes", .array(changes.map(\.json))),
        ]))
    }

    init(_ at: Field) throws {
        rowsRun = try at["rows_run"].whole(0...1 << 20)
        calls = try at["calls"].whole(0...1 << 20)
        draws = try at["draws"].whole(0...1 << 20)
        bridges = try at["bridges"].whole(0...1 << 14)
        steps = try at.nullable("steps")?.whole(1...1000)
        guidanceUntil = try at.nullable("guidance_until")?.number(0...1)
        width = try at.nullable("width")?.number(1e-3...1)
        changes = try at["changes"].list(0...4096, Change.init)
    }
}

/// A prompt becomes a picture, a row at a time (edgesd/runtime/generate.py and stage.py in one: a phone draws one
/// picture with one model). `next` computes a row; between rows a caller may show a preview, save, wait or stop.
public final class Run {
    public let settings: Settings
    public private(set) var log: RunLog
    /// The last finished row.
    public private(set) var step: Step?
    public let truncated: String
    private let pipeline: Pipeline
    private let noise: Philox
    private let shape: [Int]
    private let governor: Governor?
    private var loop: Loop
    private var plan: RunPlan
    private let cond: Conditions
    private let uncond: Conditions?
    private var width: Double?
    private var before: Tensor?
    private var finished = false
    private var asked: Bool

    /// governor: a policy, asked before every step; settings with changes repeat them without one.
    /// resume: what `saved` of an earlier run with the same pipeline and settings gave.
    public init(
        _ pipeline: Pipeline, _ settings: Settings, cache: PromptCache = PromptCache(), governor: Governor? = nil,
        resume: SavedRun? = nil
    ) throws {
        try settings.check()
        (self.pipeline, self.settings) = (pipeline, settings)
        self.governor = governor ?? (settings.changes.isEmpty ? nil : Replay(settings.changes))
        let latent = pipeline.spec.latent, size = pipeline.spec.defaults.sizePx
        guard size[0] % latent.downscale == 0, size[1] % latent.downscale == 0 else {
            throw requestError("a picture of \(size[1])x\(size[0]) px", "multiples of \(latent.downscale)", "Package it in another size")
        }
        shape = [1, latent.channels, size[0] / latent.downscale, size[1] / latent.downscale]
        noise = try Philox(seed: settings.seed)
        log = try resume.map { try Run.log($0) } ?? RunLog()
        let table = try pipeline.table(settings.sampler, log.steps ?? settings.numInferenceSteps)
        if let resume {
            guard settings.earlyStop == nil else {
                throw requestError("a run to resume with early stop", "one without", "Draw the picture anew")
            }
            log.last = resume.last
            loop = try Loop(table, try resume.fitting(table, owner: Run.owner(pipeline, settings)))
            guard loop.state.inputs[0].shape == shape else {
                throw dataError("the saved run of another size", "\(shape)", "Draw the picture anew")
            }
        } else {
            let drawn = noise.normal(Array(shape.dropFirst()), image: UInt32(settings.index), row: 0, purpose: .start)
            loop = try Loop(table, latents: initLatents(table, Tensor(shape, drawn.values)))
        }
        asked = resume == nil
        plan = try Run.plan(pipeline, settings, log, table)
        (cond, truncated) = try pipeline.conditions(settings, sizePx: size, cache, negative: false)
        uncond = try plan.uncond.contains(true) ? pipeline.conditions(settings, sizePx: size, cache, negative: true).0 : nil
    }

    /// Computes the next row; nil where the run is over and `picture` may be asked for.
    public func next() throws -> Step? {
        if finished { return nil }
        if let governor {
            if log.rowsRun == 0 {
                log.changes += try governor.ask(rowsRun: 0, calls: 0)
            } else if let step, asked {
                try change(leaving: step.table, step.row, sample: step.sample, step.modelOutput, governor)
            } else if !asked, let last = log.last, loop.state.row < loop.table.rows {
                // What an uninterrupted run is asked after the row that this one was stopped behind.
                try change(leaving: loop.table, loop.state.row - 1, sample: last.sample, last.modelOutput, governor)
            }
        }
        asked = true
        var rest = loop  // what the UNet is asked reads `loop` meanwhile
        let made = try rest.next(denoise: denoise) { row in
            log.draws += 1  // after a bridge no row draws what a row before it drew
            let keyed = UInt32(row + log.bridges << 16)
            let drawn = noise.normal(Array(shape.dropFirst()), image: UInt32(settings.index), row: keyed, purpose: .step)
            return Tensor(shape, drawn.values)
        }
        loop = rest
        guard let made else {
            finished = true
            return nil
        }
        (step, log.last) = (made, (made.sample, made.modelOutput))
        log.rowsRun += 1
        finished = made.isLast
        if plan.earlyStop != nil, !finished {
            let x0 = made.denoised
            finished = before.map { plan.settled($0, x0) } ?? false
            before = x0
        }
        return made
    }

    /// The picture after the last row, or of x0 where the run stopped early.
    public func picture() throws -> Picture {
        let state = loop.state
        guard let final = step.map({ $0.isLast ? $0.latents : $0.denoised }) ?? (state.row == loop.table.rows ? state.inputs[0] : nil)
        else { throw requestError("a run without steps", "at least one", "Draw some rows first") }
        var told = settings, notes = log.changes.map(\.told)
        told.changes = log.changes
        if let step, !step.isLast {
            notes.append("stopped early after row \(step.row + 1) of \(step.table.rows): \(plan.calls(from: step.row + 1)) UNet calls saved")
        }
        return Picture(image: try pipeline.decode(final), latents: final, settings: told, calls: log.calls,
                       stepsRun: log.rowsRun, truncated: truncated, notes: notes)
    }

    /// All that is needed to go on later, in another process too.
    public var saved: SavedRun {
        SavedRun(loop.table, loop.state, owner: Run.owner(pipeline, settings), told: log.json.dumped, last: log.last)
    }

    private static func owner(_ pipeline: Pipeline, _ settings: Settings) -> String {
        Sha256.hex("\(pipeline.identity) \(settings.json.dumped)".utf8)
    }

    private static func log(_ saved: SavedRun) throws -> RunLog {
        let broken = dataError("the saved run's log does not parse", "what edgesd saved", "Draw the picture anew")
        let json = try Json.parse(Array(saved.told.utf8), orElse: broken)
        do { return try RunLog(Field(json, "log")) } catch is Field.Wrong { throw broken }
    }

    /// The plan of the table in force: the settings', less what has changed since.
    private static func plan(_ pipeline: Pipeline, _ settings: Settings, _ log: RunLog, _ table: SamplerTable) throws -> RunPlan {
        let guided = settings.guidanceScale > 1 && pipeline.spec.guidanceEmbeddingDim == 0
        return try RunPlan.make(
            settings.guidanceSchedule, rows: table.rows, guidance: guided ? settings.guidanceScale : 1,
            until: log.guidanceUntil ?? settings.guidanceUntil, rescale: settings.guidanceRescale,
            width: log.width ?? settings.width, switchTo: log.width == nil ? settings.switchTo : nil,
            earlyStop: settings.earlyStop)
    }

    /// Lets the governor have its way after a row.
    private func change(leaving table: SamplerTable, _ row: Int, sample: Tensor, _ output: Tensor, _ governor: Governor) throws {
        for change in try governor.ask(rowsRun: log.rowsRun, calls: log.calls) {
            var entered = false
            // The table in force, not the one left: it may have been changed by the change before.
            if change.kind != .pause, change.steps != loop.table.steps {
                let other = try pipeline.table(settings.sampler, change.steps)
                let state = bridge(table, row, sample: sample, modelOutput: output, into: other)
                if other.rows - state.row > 0, other.rows - state.row < table.rows - row - 1 {
                    log.bridges += 1
                    log.steps = change.steps
                    loop = try Loop(other, state)
                    entered = true
                }
            }
            if change.kind == .shorten, !entered, change.steps != loop.table.steps { continue }  // it would save nothing
            log.guidanceUntil = change.guidanceUntil
            if change.kind == .narrow || change.kind == .shorten { log.width = change.width }
            plan = try Run.plan(pipeline, settings, log, loop.table)
            log.changes.append(change)
        }
    }

    /// Guidance over one or two halves, at the row's width.
    private func denoise(_ sample: Tensor, _ row: Int) throws -> Tensor {
        if plan.width[row] != width {
            try pipeline.session.useWidth("unet", plan.width[row])
            width = plan.width[row]
        }
        guard plan.uncond[row], let uncond else { return try predict(sample, row, cond) }
        let told = cond.reduce(into: Conditions()) { $0[$1.key] = .stacked([uncond[$1.key]!, $1.value]) }
        let both = try predict(.stacked([sample, sample]), row, told)
        return combine(both.rows(0..<1), both.rows(1..<2), guidance: plan.guidance[row], rescale: plan.rescale)
    }

    /// The UNet on any number of rows, in calls of the size that the session takes.
    private func predict(_ sample: Tensor, _ row: Int, _ told: Conditions) throws -> Tensor {
        let count = sample.shape[0], sizes = pipeline.session.batches("unet")
        log.calls += count
        var outputs: [Tensor] = [], done = 0
        while done < count {
            guard let size = sizes.map({ $0.filter { $0 <= count - done }.max() }) ?? count - done else {
                throw requestError("a UNet of \(sizes!.min()!) rows a call", "one row, or two with guidance", "Package it again")
            }
            let part = done..<done + size
            var inputs = told.mapValues { AnyArray.f32($0.rows(part)) }
            inputs["sample"] = .f32(sample.rows(part))
            inputs["timestep"] = .f32(Tensor([1], [loop.table.timestep[row]]))
            guard let output = try pipeline.session.run("unet", inputs)["model_output"] else {
                throw dataError("the unet gave no model_output", "what docs/bundle.md describes", "Package the model again")
            }
            outputs.append(output)
            done += size
        }
        return .stacked(outputs)
    }
}

extension Pipeline {
    /// Finished latents [1,C,h,w] -> picture [H,W,3].
    public func decode(_ latents: Tensor) throws -> NDArray<UInt8> {
        let (scale, shift) = (Float(spec.latent.scalingFactor), Float(spec.latent.shiftFactor))
        let scaled = Tensor(latents.shape, latents.values.map { $0 / scale + shift })
        guard let image = try session.run("vae_decoder", ["latents": .f32(scaled)])["image"] else {
            throw dataError("the vae_decoder gave no image", "what docs/bundle.md describes", "Package the model again")
        }
        return try toUint8(image)
    }
}

extension Picture {
    /// What goes into the PNG beside the pixels, by Python's names: `edgesd generate --from` reads it.
    public func record(_ pipeline: Pipeline, decision: Decision? = nil) -> Json {
        var fields: [(String, Json)] = [
            ("settings", settings.json), ("model", .string(pipeline.spec.name)), ("identity", .string(pipeline.identity)),
            ("size_px", .array([.int(image.shape[0]), .int(image.shape[1])])), ("calls", .int(calls)),
            ("steps_run", .int(stepsRun)), ("truncated", .string(truncated)), ("notes", .array(notes.map(Json.string))),
        ]
        if let decision {
            fields.append(("decision", .object(JsonObject([("row", .string(decision.row)), ("reason", .string(decision.reason))]))))
        }
        return .object(JsonObject(fields))
    }
}
