/// The bundle's schema, read as strictly as edgesd/manifest.py reads it (docs/bundle.md).
public struct Manifest: Sendable {
    public static let major = 1
    public static let knownCritical: Set<String> = ["chunked-prompts", "expanded-tokens", "prompt-bank"]
    static let maxBytes = 16 << 20
    static let maxValues = 1 << 18
    static let maxBundleBytes = 1 << 36

    public let format, target: String
    public let critical: [String]
    public let model: ModelSpec
    public let components: [Component]
    public let samplers: [SamplerFile]
    public let policies: [PolicyFile]
    public let golden, prompts: String?
    public let quality: JsonObject
    public let provenance: Provenance
    public let downgrades: [Downgrade]
    public let files: [FileEntry]

    public func component(_ name: String) throws -> Component {
        if let found = components.first(where: { $0.name == name }) { return found }
        throw dataError("the bundle has no component '\(shown(name))'", components.map(\.name).joined(separator: ", "),
                        "Package it again with that component")
    }
}

public struct TensorSpec: Sendable {
    public let name, dtype, meaning: String
    public let shape: [Int]
}

public struct FileEntry: Sendable {
    public let path, sha256: String
    public let bytes: Int
}

/// What one variant of a component is made for. A reader picks by these, never by a file name.
public struct Axes: Sendable, Equatable {
    public var width = 1.0
    public var sizePx: [Int]
    public var batch = 1
    public var precision = "fp32"
    public var chunk = [0, 1]
    public var form = ""
}

/// One artefact of a component. files[0] is what a runtime opens; the rest lie beside it.
public struct Variant: Sendable {
    public let axes: Axes
    public let files: [String]
    public let inputs, outputs: [TensorSpec]
    public let params, macs: Int
    public let status, runtime, computeUnits: String
    public let snrDb, seconds: Double?
    /// What snrDb must reach, where the artefact's own simulation says so.
    public let gateDb: Double?
    /// The file of the quantization plan.
    public let plan: String?
}

public struct Component: Sendable {
    public let name: String
    public let variants: [Variant]
}

/// One tokenizer.json and how a prompt is laid out for its text encoder.
public struct TokenizerSpec: Sendable {
    public let file, component: String
    public let maxLength, chunks: Int
    /// Ids that stand for several: id -> how many ids from it on.
    public let expand: [Int: Int]
    public let bosId, eosId, padId: Int

    public init(file: String, component: String, maxLength: Int, chunks: Int = 1, expand: [Int: Int] = [:],
                bosId: Int, eosId: Int, padId: Int) {
        (self.file, self.component, self.maxLength, self.chunks) = (file, component, maxLength, chunks)
        (self.expand, self.bosId, self.eosId, self.padId) = (expand, bosId, eosId, padId)
    }
}

public struct LatentSpec: Sendable {
    public let channels, downscale: Int
    public let scalingFactor, shiftFactor: Double
    /// Factors latent -> RGB in 0..1, rows R, G, B, and what is added: cheap previews.
    public let rgbFactors: [[Double]]?
    public let rgbBias: [Double]?
}

public struct Defaults: Sendable {
    public let sampler: String
    public let steps: Int
    public let guidance: Double
    public let sizePx: [Int]
}

public struct ModelSpec: Sendable {
    public let name, family, predictionType: String
    public let unetInChannels: Int
    public let latent: LatentSpec
    public let tokenizers: [TokenizerSpec]
    public let defaults: Defaults
    public let zeroEmptyNegative, timeIds: Bool
    public let guidanceEmbeddingDim, clipSkip: Int
}

public struct SamplerFile: Sendable {
    public let name, file: String
    public let steps: [Int]
}

public struct PolicyFile: Sendable {
    public let name, file: String
}

public struct Provenance: Sendable {
    public let source, revision, sha256, licence, made: String
}

public struct Downgrade: Sendable {
    public let component, what, why: String
}
