import Foundation

/// One prompt laid out for its text encoder, a row a call: ids and weights [n][L], start, end and padding included.
/// truncated: the text that did not fit, "" when all did.
public struct Tokens: Sendable {
    public let ids: [[Int]]
    public let weights: [[Float]]
    public let truncated: String

    public var weighted: Bool { weights.contains { $0.contains { $0 != 1 } } }
}

/// A tokenizer.json with the layout its text encoder wants (edgesd/runtime/tokenizer.py).
public struct PromptTokenizer: Sendable {
    public static let maxPromptChars = 20_000
    static let maxBytes = 64 << 20

    public let spec: TokenizerSpec
    private let bpe: ClipBpe

    /// DataError if the file is no CLIP tokenizer or lacks the spec's ids.
    public init(_ data: [UInt8], _ spec: TokenizerSpec) throws {
        let fix = "Get the bundle again from where it came, or package the model again"
        guard data.count <= PromptTokenizer.maxBytes else {
            throw dataError("a tokenizer of \(data.count) bytes", "up to \(PromptTokenizer.maxBytes)", fix)
        }
        do { bpe = try ClipBpe(try Json.parse(data)) } catch let error as Json.Malformed {
            throw dataError("\(spec.file) does not load (\(error.reason))", "a tokenizer.json", fix)
        } catch let error as ClipBpe.Unknown {
            throw dataError("\(spec.file) does not load (\(shown(error.reason)))", "a CLIP tokenizer.json", fix)
        }
        let largest = ([spec.bosId, spec.eosId, spec.padId] + spec.expand.map { $0.key + $0.value - 1 }).max()!
        guard largest < bpe.vocabSize else { throw dataError("token id \(largest)", "below \(bpe.vocabSize) in \(spec.file)", fix) }
        self.spec = spec
    }

    /// weighted: false takes brackets and backslashes as plain text. RequestError for a prompt that is too long, nests
    /// too deep or asks for a weight out of range.
    public func encode(_ prompt: String, weighted: Bool = true) throws -> Tokens {
        let length = prompt.unicodeScalars.count
        guard length <= PromptTokenizer.maxPromptChars else {
            throw requestError("a prompt of \(length) characters", "up to \(PromptTokenizer.maxPromptChars)", "Shorten it")
        }
        let fragments = weighted ? try PromptWeights.parse(prompt) : [Fragment(text: prompt, weight: 1)]
        var pieces: [(id: Int, weight: Float, fragment: Int, start: Int)] = []
        for (index, fragment) in fragments.enumerated() {
            for token in bpe.encode(fragment.text) {
                for id in token.id..<token.id + (spec.expand[token.id] ?? 1) {
                    pieces.append((id, Float(fragment.weight), index, token.start))
                }
            }
        }
        let room = spec.maxLength - 2
        var ids: [[Int]] = [], weights: [[Float]] = []
        for call in 0..<spec.chunks {
            let part = pieces.dropFirst(call * room).prefix(room)
            let padding = room - part.count
            ids.append([spec.bosId] + part.map(\.id) + [spec.eosId] + Array(repeating: spec.padId, count: padding))
            weights.append([1] + part.map(\.weight) + Array(repeating: 1, count: padding + 1))
        }
        let fits = room * spec.chunks
        var rest = ""
        if pieces.count > fits {
            let first = pieces[fits], scalars = Array(fragments[first.fragment].text.unicodeScalars)
            rest = stripped(text(scalars[first.start...]) + fragments[(first.fragment + 1)...].map(\.text).joined())
        }
        return Tokens(ids: ids, weights: weights, truncated: rest)
    }
}

/// Scales text states [1,L,D] by token weights [L] and keeps their mean, as AUTOMATIC1111's web UI does. The mean taken
/// is that of all values, in float64.
func applyWeights(_ hidden: Tensor, _ weights: [Float]) -> Tensor {
    let width = hidden.shape[2]
    let weighted = hidden.values.enumerated().map { Double($1) * Double(weights[$0 / width]) }
    let before = hidden.values.reduce(0.0) { $0 + Double($1) } / Double(hidden.count)
    let after = weighted.reduce(0, +) / Double(hidden.count)
    let scale = before * after > 0 ? before / after : 1
    return Tensor(hidden.shape, weighted.map { Float($0 * scale) })
}
