import Foundation

/// The golden vectors of a bundle (edgesd/golden.py): one run of the float32 reference, repeated on this device.
public struct SelfTest {
    /// One comparison: dB of SNR against what must be reached (nil: reported, no gate), or a plain yes or no.
    public struct Result: Sendable, Identifiable {
        public let name: String
        public let decibels, gate: Double?
        public let passed: Bool

        public var id: String { name }
    }

    private struct RecordedCall {
        let component: String
        let inputs, outputs: [String: String]
    }

    private let facts: Field
    private let tensors: [String: AnyArray]
    private let calls: [RecordedCall]
    private let manifest: Manifest

    /// DataError where the bundle has no golden vectors or they do not fit together.
    public init(_ bundle: ModelBundle) throws {
        func broken(_ what: String) -> EdgesdError {
            dataError("the golden vectors do not read (\(shown(what)))", "what edgesd wrote", "Package the model again")
        }
        manifest = bundle.manifest
        guard let listed = manifest.golden else { throw broken("there are none") }
        let path = listed.hasSuffix(".json") ? String(listed.dropLast(5)) + ".safetensors" : listed
        let json = try Json.parse(bundle.bytes(listed, limit: 1 << 30), orElse: broken("no JSON"))
        facts = Field(json, "golden")
        guard let file = try? Safetensors(parsing: bundle.bytes(path, limit: 1 << 30)) else { throw broken("no tensors") }
        tensors = file.tensors
        do {
            calls = try facts["calls"].list(1...256) { call in
                func side(_ key: String) throws -> [String: String] {
                    Dictionary(try call[key].object().fields.map { ($0.key, $0.value.text ?? "") }, uniquingKeysWith: { $1 })
                }
                return RecordedCall(component: try call["component"].text(), inputs: try side("inputs"), outputs: try side("outputs"))
            }
        } catch let error as Field.Wrong { throw broken("\(error.place): \(error.what)") }
        for key in calls.flatMap({ Array($0.inputs.values) + Array($0.outputs.values) }) where tensors[key] == nil {
            throw broken("tensor \(key) is missing")
        }
    }

    /// Compares in the order that makes the first difference name its cause: ids, noise, each component, the latents,
    /// the picture. `report` gets each result as it is known.
    public func run(_ pipeline: Pipeline, report: (Result) throws -> Void) throws {
        let settings = try recordedSettings(pipeline)
        if let widest = pipeline.session.widths("unet").first { try pipeline.session.useWidth("unet", widest) }  // what was recorded
        for (index, tokenizer) in pipeline.tokenizers.enumerated() {
            let same = try ["prompt": settings.prompt, "negative": settings.negativePrompt].allSatisfy { side, text in
                try tensors["ids/\(index)/\(side)"]?.i64?.values == tokenizer.encode(text).ids.flatMap { $0.map(Int64.init) }
            }
            try report(Result(name: "token ids \(index + 1)", decibels: nil, gate: nil, passed: same))
        }
        if let noise = tensors["noise"]?.f32 {
            let made = try Philox(seed: settings.seed).normal(noise.shape, row: 0, purpose: .start)
            let same = zip(noise.values, made.values).allSatisfy { abs($0 - $1) <= $0.ulp }
            try report(Result(name: "noise", decibels: nil, gate: nil, passed: same))
        }
        for component in manifest.components.map(\.name) where pipeline.session.has(component) {
            try measure(component, pipeline).map(report)
        }
        try compareRun(pipeline, settings, report)
    }

    private func gate(_ component: String) -> Field {
        let precision = (try? manifest.component(component))?.variants.first?.axes.precision ?? "fp32"
        return facts["gates"][precision]
    }

    private func measure(_ component: String, _ pipeline: Pipeline) throws -> Result? {
        var worst: Double?
        for call in calls where call.component == component {
            let outputs = try pipeline.session.run(component, call.inputs.mapValues { tensors[$0]! })
            for (name, key) in call.outputs {
                guard let made = outputs[name], let wanted = tensors[key]?.f32 else { continue }
                worst = min(worst ?? .infinity, snrDb(made, wanted))
            }
        }
        let own = (try manifest.component(component)).variants.first?.gateDb
        let gate = own ?? self.gate(component)["snr_db"].json?.number
        return worst.map { Result(name: component, decibels: $0, gate: gate, passed: $0 >= gate ?? -.infinity) }
    }

    private func compareRun(_ pipeline: Pipeline, _ settings: Settings, _ report: (Result) throws -> Void) throws {
        let run = try Run(pipeline, settings), gates = gate("unet")
        var worst = Double.infinity, row = 0
        while let step = try run.next() {
            if let wanted = tensors["latents"]?.f32, row < wanted.shape[0] {
                worst = min(worst, snrDb(step.latents, wanted.rows(row..<row + 1)))
            }
            row += 1
        }
        let gate = gates["latents_snr_db"].json?.number
        try report(Result(name: "latents of every row", decibels: worst, gate: gate, passed: worst >= gate ?? -.infinity))
        guard let wanted = tensors["picture"]?.u8, wanted.shape.count == 3 else { return }
        let stride = facts["picture_stride"].json?.whole ?? 1
        let psnr = SelfTest.psnrDb(try run.picture().image, wanted, stride: max(stride, 1))
        let floor = gates["picture_psnr_db"].json?.number
        try report(Result(name: "picture", decibels: psnr, gate: floor, passed: psnr >= floor ?? -.infinity))
    }

    private func recordedSettings(_ pipeline: Pipeline) throws -> Settings {
        do {
            var settings = Settings(prompt: try facts["prompt"].text(), pipeline.spec)
            settings.negativePrompt = try facts.optional("negative_prompt")?.text() ?? ""
            settings.seed = try facts.optional("seed")?.count() ?? 0
            settings.sampler = try facts["sampler"].name()
            settings.numInferenceSteps = try facts["steps"].whole(1...1000)
            settings.guidanceScale = try facts["guidance"].number()
            return settings
        } catch let error as Field.Wrong {
            throw dataError("the golden vectors do not read (\(error.place))", "what edgesd wrote", "Package the model again")
        }
    }

    private static func psnrDb(_ image: NDArray<UInt8>, _ wanted: NDArray<UInt8>, stride: Int) -> Double {
        let width = image.shape[1]
        var sum = 0.0
        for y in 0..<wanted.shape[0] {
            for x in 0..<wanted.shape[1] where y * stride < image.shape[0] && x * stride < width {
                for c in 0..<3 {
                    let mine = image.values[(y * stride * width + x * stride) * 3 + c]
                    let difference = Double(mine) - Double(wanted.values[(y * wanted.shape[1] + x) * 3 + c])
                    sum += difference * difference
                }
            }
        }
        return sum == 0 ? 100 : min(100, 10 * log10(255 * 255 * Double(wanted.count) / sum))
    }
}

/// Signal to noise in dB, at most 200 either way; numbers that are not finite count as nothing but noise.
public func snrDb(_ made: Tensor, _ wanted: Tensor) -> Double {
    guard made.shape == wanted.shape, made.isFinite else { return -200 }
    var (signal, noise) = (0.0, 0.0)
    for (a, b) in zip(made.values, wanted.values) {
        let off = Double(a) - Double(b)
        signal += Double(b) * Double(b)
        noise += off * off
    }
    if noise == 0 { return 200 }
    return signal == 0 ? -200 : min(max(10 * log10(signal / noise), -200), 200)
}
