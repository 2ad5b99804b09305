import Foundation

/// A model that is ready to draw, whatever runs it (edgesd/runtime/pipeline.py, edgesd/sources.py).
public struct Pipeline {
    public let spec: ModelSpec
    public let session: Session
    let tokenizers: [PromptTokenizer]
    let bank: PromptBank?
    /// A hash of the weights: the key under which prompt embeddings may be cached.
    public let identity: String
    public let widths: Widths?
    /// RequestError for a sampler or step count the bundle lacks.
    public let table: (_ sampler: String, _ steps: Int) throws -> SamplerTable
    /// Sampler name -> the step counts there are tables for.
    public let steps: (String) -> [Int]
    /// Prompts that were prepared, of a bundle without text encoders.
    public var preparedPrompts: [String]? { bank?.prompts.filter { !$0.isEmpty } }

    /// A bundle with what runs its components.
    public init(_ bundle: ModelBundle, _ session: Session) throws {
        let manifest = bundle.manifest
        spec = manifest.model
        self.session = session
        guard spec.unetInChannels == spec.latent.channels else {
            throw requestError("a model of \(spec.unetInChannels) input channels, for inpainting", "models that draw from words alone",
                               "Use edgesd generate for this one")
        }
        tokenizers = try spec.tokenizers.map { try PromptTokenizer(bundle.bytes($0.file, limit: PromptTokenizer.maxBytes + 1), $0) }
        bank = try manifest.prompts.map { try PromptBank(bundle.bytes($0, limit: PromptBank.maxBytes + 1)) }
        identity = "\(manifest.provenance.sha256)-\(manifest.target)"
        widths = try Widths.read(manifest)
        let files = Dictionary(manifest.samplers.map { ($0.name, $0) }, uniquingKeysWith: { first, _ in first })
        steps = { files[$0]?.steps ?? [] }
        let read = Memo<String, TableFile> { try TableFile(bundle.bytes($0, limit: TableFile.maxBytes + 1)) }
        table = { name, steps in
            guard let entry = files[name] else {
                throw requestError("sampler '\(shown(name, limit: 60))'", "this bundle holds \(files.keys.sorted().joined(separator: ", "))",
                                   "Choose one of these")
            }
            guard entry.steps.contains(steps) else {
                throw requestError("\(steps) steps of \(name)", "this bundle holds \(entry.steps.min()!) to \(entry.steps.max()!)",
                                   "Choose one of these, or package with --steps")
            }
            if let table = try read[entry.file].table(name, steps: steps) { return table }
            throw dataError("\(entry.file) lacks \(name) with \(steps) steps", "what the manifest lists", "Package the model again")
        }
    }

    /// What a policy may choose from: the sampler's step counts and the UNet's widths.
    public func limits(_ sampler: String) -> Limits {
        var limits = Limits()
        limits.steps = steps(sampler).sorted()
        limits.widths = session.widths("unet").sorted()
        return limits
    }
}

extension ModelBundle {
    /// Names of the policies there are, the bundle's own first.
    public var policyNames: [String] {
        let own = manifest.policies.map(\.name)
        return own + Policy.shipped.filter { !own.contains($0) }
    }

    /// The bundle's own policy of that name, checked as any, else the shipped one.
    public func policy(_ name: String) throws -> Policy {
        guard let entry = manifest.policies.first(where: { $0.name == name }) else { return try Policy.load(name) }
        let policy = try Policy.parse(bytes(entry.file, limit: Policy.maxBytes + 1))
        guard policy.name == name else {
            throw dataError("\(entry.file) holds the policy \(policy.name)", "\(name), as its manifest says", "Package the model again")
        }
        return policy
    }
}

/// Values made once by key.
private final class Memo<Key: Hashable, Value> {
    private var made: [Key: Value] = [:]
    private let make: (Key) throws -> Value

    init(_ make: @escaping (Key) throws -> Value) { self.make = make }

    subscript(key: Key) -> Value {
        get throws {
            if let found = made[key] { return found }
            let value = try make(key)
            made[key] = value
            return value
        }
    }
}
