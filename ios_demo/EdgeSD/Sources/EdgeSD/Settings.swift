import Foundation

/// What decides a picture, to the pixel: it travels in the PNG (edgesd/runtime/settings.py). What this runtime has no
/// part for (start images, a refiner, torch's noise) is refused when it is read, never passed over.
public struct Settings: Sendable, Equatable {
    public static let maxGuidance = 100.0

    public var prompt: String
    public var negativePrompt = ""
    public var seed = 0
    public var index = 0
    public var numInferenceSteps = 20
    public var sampler = "dpmpp_2m_karras"
    public var guidanceScale = 7.5
    public var guidanceSchedule = "constant"
    public var guidanceUntil = 1.0
    public var guidanceRescale = 0.0
    public var earlyStop: Double?
    public var width = 1.0
    public var switchTo: WidthSwitch?
    public var changes: [Change] = []

    /// The model's defaults.
    public init(prompt: String, _ spec: ModelSpec) {
        self.prompt = prompt
        numInferenceSteps = spec.defaults.steps
        sampler = spec.defaults.sampler
        guidanceScale = spec.defaults.guidance
    }

    public init(prompt: String) { self.prompt = prompt }

    /// RequestError that names the setting that cannot be.
    public func check() throws {
        let rules: [(Bool, String, String, String)] = [
            (!stripped(prompt).isEmpty, "an empty prompt", "at least one word", "Say what to draw"),
            ((1...1000).contains(numInferenceSteps), "\(numInferenceSteps) steps", "1 to 1000", "Change the steps"),
            ((0...Settings.maxGuidance).contains(guidanceScale), "guidance \(guidanceScale)", "0 to 100", "Change it"),
            ((0...1).contains(guidanceUntil), "guidance until \(guidanceUntil)", "0 to 1", "Change it"),
            ((0...1).contains(guidanceRescale), "guidance rescale \(guidanceRescale)", "0 to 1", "Change it"),
            (RunPlan.schedules.contains(guidanceSchedule), "schedule '\(shown(guidanceSchedule))'",
             RunPlan.schedules.joined(separator: ", "), "Choose one"),
            (earlyStop.map { $0 > 0 && $0 < 1 } ?? true, "early stop \(earlyStop ?? 0)", "above 0, below 1", "Change it"),
            ((0..<1000).contains(index), "picture \(index)", "0 to 999", "Change the count"),
            (width > 0 && width <= 1, "width \(width)", "above 0, at most 1", "Change the width"),
            (switchTo.map { (0...1).contains($0.share) && $0.width > 0 && $0.width <= 1 } ?? true, "a change of width",
             "a share of the run and a width, each 0 to 1", "Change it"),
        ]
        for (good, came, allowed, fix) in rules where !good { throw requestError(came, allowed, fix) }
        _ = try checkSeed(seed)
    }

    /// All that Python's Settings holds, by its names.
    public var json: Json {
        .object(JsonObject([
            ("prompt", .string(prompt)), ("negative_prompt", .string(negativePrompt)), ("seed", .int(seed)),
            ("index", .int(index)), ("num_inference_steps", .int(numInferenceSteps)), ("sampler", .string(sampler)),
            ("guidance_scale", .double(guidanceScale)), ("guidance_schedule", .string(guidanceSchedule)),
            ("guidance_until", .double(guidanceUntil)), ("guidance_rescale", .double(guidanceRescale)),
            ("early_stop", earlyStop.map(Json.double) ?? .null), ("width", .double(width)),
            ("switch", switchTo.map { .array([.double($0.share), .double($0.width)]) } ?? .null),
            ("changes", .array(changes.map(\.json))),
        ]))
    }

    /// Settings as a PNG carries them. DataError for what does not parse, RequestError for what is not drawn here.
    public init(json: Json) throws {
        let at = Field(json, "settings")
        do {
            prompt = try at["prompt"].text(Json.maxInt)
            negativePrompt = try at.optional("negative_prompt")?.text(Json.maxInt) ?? negativePrompt
            seed = try at.optional("seed")?.count() ?? seed
            index = try at.optional("index")?.count() ?? index
            numInferenceSteps = try at.optional("num_inference_steps")?.whole(1...1000) ?? numInferenceSteps
            sampler = try at.optional("sampler")?.name() ?? sampler
            guidanceScale = try at.optional("guidance_scale")?.number() ?? guidanceScale
            guidanceSchedule = try at.optional("guidance_schedule")?.text() ?? guidanceSchedule
            guidanceUntil = try at.optional("guidance_until")?.number() ?? guidanceUntil
            guidanceRescale = try at.optional("guidance_rescale")?.number() ?? guidanceRescale
            earlyStop = try at.nullable("early_stop")?.number()
            width = try at.optional("width")?.number() ?? width
            if let pair = try at.nullable("switch")?.list(2...2, { try $0.number() }) {
                switchTo = WidthSwitch(share: pair[0], width: pair[1])
            }
            changes = try at.list("changes", 0...4096, Change.init)
            try Settings.refuseTheRest(at)
        } catch let error as Field.Wrong {
            throw dataError("the picture's settings do not parse (\(error.place): \(error.what))", "what edgesd writes",
                            "Set them by hand")
        }
        try check()
    }

    private static func refuseTheRest(_ at: Field) throws {
        let known: Set = [
            "prompt", "negative_prompt", "seed", "index", "num_inference_steps", "sampler", "guidance_scale",
            "guidance_schedule", "guidance_until", "guidance_rescale", "early_stop", "width", "switch", "changes",
        ]
        // What Python writes besides, at the values that mean nothing here.
        let plain: [String: (Json) -> Bool] = [
            "strength": { $0.number == 1 }, "rng": { $0.text == "philox" }, "refiner_start": { $0.isNull },
            "original_size": { $0.isNull }, "target_size": { $0.isNull },
            "crops_coords_top_left": { $0.list?.map(\.whole) == [0, 0] }, "aesthetic_score": { $0.number == 6 },
            "negative_aesthetic_score": { $0.number == 2.5 },
        ]
        for (key, value) in try at.object().fields where !known.contains(key) {
            guard let isPlain = plain[key] else { throw at.wrong("'\(shown(key, limit: 40))' is not known") }
            guard isPlain(value) else {
                throw requestError("a picture with \(key) \(shown(value.dumped, limit: 40))", "pictures drawn from words alone",
                                   "Draw this one with edgesd generate --from")
            }
        }
    }
}
