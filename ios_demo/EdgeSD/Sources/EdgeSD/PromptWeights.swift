import Foundation

/// A stretch of a prompt and its weight.
public struct Fragment: Equatable, Sendable {
    public let text: String
    public let weight: Double
}

/// Prompt weights as AUTOMATIC1111's web UI has them (edgesd/runtime/tokenizer.py): `(word)` times 1.1, `[word]` times
/// 1/1.1, `(word:1.3)` times 1.3; they nest; a backslash before a bracket or a backslash makes it text.
struct PromptWeights {
    static let maxNesting = 32, maxWeight = 10.0

    private let scalars: [Unicode.Scalar]
    private var parts: [(text: [Unicode.Scalar], weight: Double)] = []
    /// Brackets still open, each with the index of the first part inside.
    private var opened: [(bracket: Unicode.Scalar, first: Int)] = []

    /// The prompt as fragments, neighbours of equal weight joined. RequestError for brackets nested too deep, a number
    /// that is none, or a weight beyond +-10.
    static func parse(_ prompt: String) throws -> [Fragment] {
        var parser = PromptWeights(scalars: Array(prompt.unicodeScalars))
        try parser.run()
        return try parser.joined()
    }

    private init(scalars: [Unicode.Scalar]) { self.scalars = scalars }

    private mutating func run() throws {
        var at = 0
        while at < scalars.count {
            let mark = scalars[at]
            switch mark {
            case "\\":
                let escapes = at + 1 < scalars.count && "()[]\\".unicodeScalars.contains(scalars[at + 1])
                parts.append((escapes ? [scalars[at + 1]] : [], 1))
                at += escapes ? 2 : 1
            case "(", "[":
                opened.append((mark, parts.count))
                guard opened.count <= PromptWeights.maxNesting else {
                    throw requestError("a prompt with brackets nested too deep",
                                       "\(PromptWeights.maxNesting) open at a time; \\( and \\[ for the characters",
                                       "Close them or escape them")
                }
                at += 1
            case ")" where close("(", 1.1), "]" where close("[", 1 / 1.1):
                at += 1
            case ":":
                if let (text, end) = weight(at), opened.contains(where: { $0.bracket == "(" }) {
                    _ = close("(", try PromptWeights.number(text))
                    at = end
                } else {
                    let end = weight(at)?.end ?? at + 1
                    parts.append((Array(scalars[at..<end]), 1))
                    at = end
                }
            case ")", "]":
                parts.append(([mark], 1))
                at += 1
            default:
                let first = at
                while at < scalars.count, !"\\()[]:".unicodeScalars.contains(scalars[at]) { at += 1 }
                parts.append((Array(scalars[first..<at]), 1))
            }
        }
        for (bracket, _) in opened { _ = close(bracket, bracket == "(" ? 1.1 : 1 / 1.1) }
    }

    private mutating func close(_ bracket: Unicode.Scalar, _ factor: Double) -> Bool {
        guard let at = opened.lastIndex(where: { $0.bracket == bracket }) else { return false }
        for i in opened.remove(at: at).first..<parts.count { parts[i].weight *= factor }
        return true
    }

    /// `:number)` at a colon: the number's text, and where the markup ends.
    private func weight(_ colon: Int) -> (text: String, end: Int)? {
        var at = colon + 1
        func skipSpace() { while at < scalars.count, isSpace(scalars[at]) { at += 1 } }
        skipSpace()
        let first = at
        if at < scalars.count, scalars[at] == "+" || scalars[at] == "-" { at += 1 }
        let digits = at
        while at < scalars.count, scalars[at] == "." || scalars[at].properties.generalCategory == .decimalNumber { at += 1 }
        let last = at
        guard at > digits else { return nil }
        skipSpace()
        guard at < scalars.count, scalars[at] == ")" else { return nil }
        return (text(scalars[first..<last]), at + 1)
    }

    private static func number(_ given: String) throws -> Double {
        // Python's float reads digits of any script.
        let latin = given.unicodeScalars.map { scalar -> String in
            scalar.properties.numericValue.map { String(Int($0)) } ?? String(scalar)
        }.joined()
        if let value = Double(latin) { return value }
        throw requestError("prompt weight '\(shown(given, limit: 40))'", "a number within +-10",
                           "Write it like (word:1.3), or escape the brackets with a backslash")
    }

    /// Neighbours of equal weight as one fragment, so that plain text is tokenized as a whole.
    private func joined() throws -> [Fragment] {
        var out: [Fragment] = [], texts: [Unicode.Scalar] = []
        for (index, part) in parts.enumerated() {
            guard abs(part.weight) <= PromptWeights.maxWeight else {
                throw requestError("a prompt weight of \(part.weight)", "-10 to 10", "Use a smaller weight or fewer brackets")
            }
            texts += part.text
            if index + 1 == parts.count || parts[index + 1].weight != part.weight {
                out.append(Fragment(text: text(texts[...]), weight: part.weight))
                texts = []
            }
        }
        return out
    }
}

func text(_ scalars: ArraySlice<Unicode.Scalar>) -> String {
    var view = String.UnicodeScalarView()
    view.append(contentsOf: scalars)
    return String(view)
}

/// What Python's `re` takes for a space: White_Space and the four separators of ASCII.
private func isSpace(_ scalar: Unicode.Scalar) -> Bool {
    scalar.properties.isWhitespace || (0x1C...0x1F).contains(scalar.value)
}

/// As Python's str.strip.
func stripped(_ given: String) -> String {
    let scalars = Array(given.unicodeScalars)
    guard let first = scalars.firstIndex(where: { !isSpace($0) }), let last = scalars.lastIndex(where: { !isSpace($0) }) else {
        return ""
    }
    return text(scalars[first...last])
}
