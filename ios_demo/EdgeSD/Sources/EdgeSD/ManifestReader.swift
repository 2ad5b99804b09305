/// Bytes to `Manifest`. Types are exact: `true` is no number, "16" and 16.0 are no integers.
extension Manifest {
    private static let fix = "Get the bundle again from where it came, or package the model again"

    /// Parses and checks the bytes of manifest.json. DataError for anything malformed, hostile or too new.
    public static func parse(_ data: [UInt8]) throws -> Manifest {
        guard data.count <= maxBytes else {
            throw dataError("manifest.json has \(data.count) bytes", "up to \(maxBytes)", fix)
        }
        let values = data.reduce(0) { $0 + ($1 == UInt8(ascii: ",") ? 1 : 0) }
        guard values <= maxValues else {
            throw dataError("manifest.json has more than \(values) values", "up to \(maxValues)", fix)
        }
        let raw: Json
        do { raw = try Json.parse(data) } catch let error as Json.Malformed {
            throw dataError("manifest.json does not parse (\(error.reason))", "strict UTF-8 JSON", fix)
        }
        guard let object = raw.object, let format = object["format"]?.text else {
            throw dataError("manifest.json has no format", "an object with format 1.x", fix)
        }
        try checkFormat(format, critical: object["critical"])
        do { return try Manifest(Field(raw, "")) } catch let error as Field.Wrong {
            let place = error.place.isEmpty ? "" : "\(shown(error.place)): "
            throw dataError("manifest.json: \(place)\(shown(error.what))", "what docs/bundle.md describes", fix)
        }
    }

    /// Refuses another major version and critical features that this reader does not know.
    static func checkFormat(_ format: String, critical: Json?) throws {
        let parts = format.utf8.split(separator: UInt8(ascii: "."), omittingEmptySubsequences: false)
        let digits = parts.allSatisfy { (1...4).contains($0.count) && $0.allSatisfy { (0x30...0x39).contains($0) } }
        guard parts.count == 2, digits, Int(String(parts[0])!) == major else {
            throw dataError("bundle format '\(shown(format, limit: 40))'", "\(major).x",
                            "Install the app that is made for it, or package again")
        }
        let listed = critical.map { $0.list ?? [$0] } ?? []
        let unknown = listed.map { $0.text ?? "(not a name)" }.filter { !knownCritical.contains($0) }
        guard unknown.isEmpty else {
            let names = shown(unknown.prefix(8).joined(separator: ", "))
            throw dataError("the bundle needs features this edgesd lacks: \(names)",
                            knownCritical.sorted().joined(separator: ", "), "Update the app")
        }
    }

    private init(_ at: Field) throws {
        format = try at["format"].text()
        critical = try at.list("critical", 0...64) { try $0.name() }
        target = try at["target"].name()
        model = try ModelSpec(at["model"])
        components = try at.list("components", 1...16, Component.init)
        samplers = try at.list("samplers", 1...64, SamplerFile.init)
        policies = try at.list("policies", 0...64, PolicyFile.init)
        if let noise = at.optional("noise") {
            _ = try noise.optional("generator")?.oneOf(["philox4x32-10"])
            _ = try noise.optional("transform")?.oneOf(["box-muller-f64"])
            _ = try noise.optional("version")?.whole(1...1)  // other noise is another picture: nothing to ignore
        }
        golden = try at.nullable("golden")?.path()
        prompts = try at.nullable("prompts")?.path()
        quality = try at.optional("quality")?.object() ?? JsonObject()
        provenance = try Provenance(at["provenance"])
        downgrades = try at.list("downgrades", 0...4096, Downgrade.init)
        files = try at.list("files", 1...65536, FileEntry.init)
        try checkClosed()
    }

    /// What no field can say by itself: all that is used is listed, once.
    private func checkClosed() throws {
        func refuse(_ what: String) -> Field.Wrong { Field.Wrong(place: "", what: what) }
        let known = Set(files.map(\.path))
        let lower = Set(files.map { $0.path.lowercased() })  // paths are ASCII
        guard lower.count == files.count else {
            throw refuse("a file is listed twice (upper and lower case count as the same)")
        }
        guard !lower.contains("manifest.json") else { throw refuse("manifest.json lists itself") }
        var total = 0
        for file in files {
            total += min(file.bytes, Manifest.maxBundleBytes + 1)
            guard total <= Manifest.maxBundleBytes else {
                throw refuse("the files have more than \(Manifest.maxBundleBytes) bytes together")
            }
        }
        var named = components.flatMap { $0.variants.flatMap { $0.files + [$0.plan].compactMap { $0 } } }
        named += model.tokenizers.map(\.file)
        named += samplers.map(\.file) + policies.map(\.file) + [golden, prompts].compactMap { $0 }
        if let missing = named.filter({ !known.contains($0) }).min() {
            throw refuse("\(missing) is used but not listed in files")
        }
        guard Set(components.map(\.name)).count == components.count else { throw refuse("a component is listed twice") }
        guard Set(policies.map(\.name)).count == policies.count else { throw refuse("a policy is listed twice") }
    }
}

private let precisions = ["fp32", "fp16", "int8", "hybrid", "w8"]
private let roles = ["text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"]

extension TensorSpec {
    fileprivate init(_ at: Field) throws {
        name = try at["name"].name()
        dtype = try at["dtype"].oneOf(["float32", "float16", "int64", "int32"])
        shape = try at["shape"].list(0...8) { try $0.whole(1...1 << 24) }
        meaning = try at.optional("meaning")?.text() ?? ""
        var elements = 1
        for dim in shape {
            elements *= dim  // at most 2^31 before, 2^24 more: no overflow
            guard elements <= 1 << 31 else { throw at.wrong("tensor \(name) has more than \(1 << 31) elements") }
        }
    }
}

extension FileEntry {
    fileprivate init(_ at: Field) throws {
        path = try at["path"].path()
        bytes = try at["bytes"].count()
        sha256 = try at["sha256"].sha256()
    }
}

extension Axes {
    fileprivate init(_ at: Field) throws {
        sizePx = try at["size_px"].sizePx()
        if let given = at.optional("width") {
            width = try given.number(0...1)
            guard width > 0 else { throw given.wrong("should be above 0") }
        }
        batch = try at.optional("batch")?.whole(1...64) ?? batch
        precision = try at.optional("precision")?.oneOf(precisions) ?? precision
        if let pair = try at.optional("chunk")?.list(2...2, { $0 }) {
            chunk = [try pair[0].whole(0...63), try pair[1].whole(1...64)]
        }
        form = try at.optional("form")?.text(32) ?? form
    }
}

extension Variant {
    fileprivate init(_ at: Field) throws {
        axes = try Axes(at["axes"])
        files = try at["files"].list(1...4096) { try $0.path() }
        inputs = try at["inputs"].list(1...32, TensorSpec.init)
        outputs = try at["outputs"].list(1...32, TensorSpec.init)
        params = try at.optional("params")?.count() ?? 0
        macs = try at.optional("macs")?.count() ?? 0
        status = try at.optional("status")?.oneOf(["executed", "interpreted", "unverified"]) ?? "unverified"
        runtime = try at.optional("runtime")?.text() ?? ""
        computeUnits = try at.optional("compute_units")?.text(64) ?? ""
        snrDb = try at.nullable("snr_db")?.number()
        seconds = try at.nullable("seconds")?.number()
        gateDb = try at.nullable("gate_db")?.number()
        plan = try at.nullable("plan")?.path()
    }
}

extension Component {
    fileprivate init(_ at: Field) throws {
        name = try at["name"].oneOf(roles)
        variants = try at["variants"].list(1...256, Variant.init)
    }
}

extension TokenizerSpec {
    fileprivate init(_ at: Field) throws {
        let pairs = try at.list("expand", 0...1024) { pair -> (Int, Int) in
            let two = try pair.list(2...2) { $0 }
            return (try two[0].count(), try two[1].whole(2...128))
        }
        self.init(
            file: try at["file"].path(), component: try at["component"].oneOf(roles),
            maxLength: try at["max_length"].whole(3...4096), chunks: try at.optional("chunks")?.whole(1...16) ?? 1,
            expand: Dictionary(pairs, uniquingKeysWith: { $1 }), bosId: try at["bos_id"].count(),
            eosId: try at["eos_id"].count(), padId: try at["pad_id"].count())
    }

    /// The same fields as a test's JSON holds them.
    public init(json: Json) throws { try self.init(Field(json, "tokenizer")) }
}

extension LatentSpec {
    fileprivate init(_ at: Field) throws {
        channels = try at["channels"].whole(1...64)
        downscale = try at["downscale"].whole(1...64)
        scalingFactor = try at["scaling_factor"].number()
        shiftFactor = try at.optional("shift_factor")?.number() ?? 0
        rgbFactors = try at.nullable("rgb_factors")?.list(0...3) { try $0.list(0...64) { try $0.number() } }
        rgbBias = try at.nullable("rgb_bias")?.list(3...3) { try $0.number() }
    }
}

extension Defaults {
    fileprivate init(_ at: Field) throws {
        sampler = try at["sampler"].name()
        steps = try at.optional("steps")?.whole(1...1000) ?? 20
        guidance = try at.optional("guidance")?.number() ?? 7.5
        sizePx = try at["size_px"].sizePx()
    }
}

extension ModelSpec {
    fileprivate init(_ at: Field) throws {
        name = try at["name"].name()
        family = try at["family"].text(32)
        predictionType = try at["prediction_type"].oneOf(SamplerTable.predictionTypes)
        unetInChannels = try at["unet_in_channels"].whole(1...64)
        latent = try LatentSpec(at["latent"])
        tokenizers = try at["tokenizers"].list(0...4, TokenizerSpec.init)
        defaults = try Defaults(at["defaults"])
        zeroEmptyNegative = try at.optional("zero_empty_negative")?.flag() ?? false
        timeIds = try at.optional("time_ids")?.flag() ?? false
        guidanceEmbeddingDim = try at.optional("guidance_embedding_dim")?.whole(0...65536) ?? 0
        clipSkip = try at.optional("clip_skip")?.whole(0...64) ?? 0
        _ = try at.optional("scheduler")?.object()
    }
}

extension SamplerFile {
    fileprivate init(_ at: Field) throws {
        name = try at["name"].name()
        file = try at["file"].path()
        steps = try at["steps"].list(1...1000) { try $0.whole(1...1000) }
    }
}

extension PolicyFile {
    fileprivate init(_ at: Field) throws {
        name = try at["name"].word()
        file = try at["file"].path()
    }
}

extension Provenance {
    fileprivate init(_ at: Field) throws {
        source = try at["source"].text()
        revision = try at.optional("revision")?.text(128) ?? ""
        sha256 = try at["sha256"].sha256()
        licence = try at.optional("licence")?.text() ?? "unknown"
        made = try at.optional("made")?.text() ?? ""
        _ = try at.optional("edgesd")?.text()
        _ = try at.optional("recipe")?.object()
        for (_, version) in try at.optional("libraries")?.object().fields ?? [] {
            guard version.text != nil else { throw at.wrong("libraries should be texts") }
        }
        _ = try at.list("ingredients", 0...256) { entry in
            _ = try entry["kind"].name()
            _ = try entry["name"].text()
            _ = try entry["sha256"].sha256()
            _ = try entry.nullable("scale")?.number()
        }
    }
}

extension Downgrade {
    fileprivate init(_ at: Field) throws {
        component = try at["component"].text()
        what = try at["what"].text()
        why = try at["why"].text()
    }
}
