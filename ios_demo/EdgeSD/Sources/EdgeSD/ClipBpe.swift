import Foundation

/// CLIP's text pipeline (Radford et al. 2021) from a tokenizer.json: special tokens, NFC, spaces, lower case, words,
/// byte-level BPE. A file that describes another pipeline is refused: it would be read wrongly.
struct ClipBpe: Sendable {
    struct Unknown: Error { let reason: String }

    /// One token, and the index of the code point of the text at which it begins.
    typealias Token = (id: Int, start: Int)

    private let vocab: [Exact: Int]
    private let ranks: [Exact: Int]
    /// Found in the text as it came, the longest first.
    private let special: [(text: [Unicode.Scalar], id: Int)]
    /// Added words (textual inversion), found in the normalized text, the longest first; alone: only as a whole word.
    private var added: [(text: [Unicode.Scalar], id: Int, alone: Bool)] = []
    private let unknown: Int?
    private let suffix: String
    let vocabSize: Int

    private static let words =
        "<\\|startoftext\\|>|<\\|endoftext\\|>|'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+"

    init(_ json: Json) throws {
        func need(_ good: Bool, _ what: String) throws { if !good { throw Unknown(reason: what) } }
        let normalizers = json["normalizer"]?["normalizers"]?.list?.compactMap { $0["type"]?.text }
        try need(normalizers == ["NFC", "Replace", "Lowercase"], "a normalizer that is not CLIP's")
        let splits = json["pre_tokenizer"]?["pretokenizers"]?.list ?? []
        try need(splits.compactMap { $0["type"]?.text } == ["Split", "ByteLevel"], "a pre-tokenizer that is not CLIP's")
        try need(splits[0]["pattern"]?["Regex"]?.text == ClipBpe.words, "words that are not CLIP's")
        guard let model = json["model"], model["type"]?.text ?? "BPE" == "BPE", let vocab = model["vocab"]?.object,
            let merges = model["merges"]?.list
        else { throw Unknown(reason: "a model that is no BPE") }
        try need(model["byte_fallback"]?.flag != true && model["ignore_merges"]?.flag != true
            && model["fuse_unk"]?.flag != true && (model["continuing_subword_prefix"]?.text ?? "").isEmpty,
            "a BPE that is not CLIP's")
        suffix = model["end_of_word_suffix"]?.text ?? ""
        var ids: [Exact: Int] = [:]
        for (token, id) in vocab.fields {
            guard let id = id.whole, id >= 0 else { throw Unknown(reason: "an id that is no number") }
            ids[Exact(token)] = id
        }
        unknown = model["unk_token"]?.text.flatMap { ids[Exact($0)] }
        var ranks: [Exact: Int] = [:]
        for (rank, merge) in merges.enumerated() {
            let pair = merge.list?.compactMap(\.text) ?? merge.text?.split(separator: " ").map(String.init) ?? []
            try need(pair.count == 2 && ids[Exact(pair[0] + pair[1])] != nil, "a merge of unknown tokens")
            ranks[Exact("\(pair[0]) \(pair[1])")] = rank
        }
        var special: [(text: [Unicode.Scalar], id: Int)] = [], added: [(text: String, id: Int, alone: Bool)] = []
        for token in json["added_tokens"]?.list ?? [] {
            guard let content = token["content"]?.text, !content.isEmpty, let id = token["id"]?.whole else {
                throw Unknown(reason: "an added token without text or id")
            }
            let (inWords, alone) = (token["normalized"]?.flag == true, token["single_word"]?.flag == true)
            let strips = token["lstrip"]?.flag == true || token["rstrip"]?.flag == true
            try need(!strips && (inWords || !alone), "an added token with rules of its own")
            if inWords { added.append((content, id, alone)) } else { special.append((Array(content.unicodeScalars), id)) }
            ids[Exact(content)] = id
        }
        (self.vocab, self.ranks) = (ids, ranks)
        self.special = special.sorted { $0.text.count > $1.text.count }
        vocabSize = ids.count
        self.added = added.map { word in
            (normalized(Array(word.text.unicodeScalars)[...]).map(\.scalar), word.id, word.alone)
        }.sorted { $0.text.count > $1.text.count }
    }

    func encode(_ prompt: String) -> [Token] {
        let scalars = Array(prompt.unicodeScalars)
        var tokens: [Token] = [], at = 0, plain = 0
        while at < scalars.count {
            if let found = special.first(where: { scalars[at...].starts(with: $0.text) }) {
                tokens += encodePlain(scalars[plain..<at])
                tokens.append((found.id, at))
                at += found.text.count
                plain = at
            } else {
                at += 1
            }
        }
        return tokens + encodePlain(scalars[plain...])
    }

    /// Text without special tokens. The slice's indices are those of the prompt.
    private func encodePlain(_ scalars: ArraySlice<Unicode.Scalar>) -> [Token] {
        let lower = normalized(scalars)
        var tokens: [Token] = [], at = 0, plain = 0
        func bpe(_ range: Range<Int>) { for word in words(Array(lower[range])) { tokens += merged(word) } }
        while at < lower.count {
            guard let found = added.first(where: { lower[at...].lazy.map(\.scalar).starts(with: $0.text) }) else {
                at += 1
                continue
            }
            let end = at + found.text.count
            let inWord = (at > 0 && isWord(lower[at - 1].scalar)) || (end < lower.count && isWord(lower[end].scalar))
            if !found.alone || !inWord {
                bpe(plain..<at)
                tokens.append((found.id, lower[at].start))
                plain = end
            }
            at = end
        }
        bpe(plain..<lower.count)
        return tokens
    }

    /// What regular expressions call \w.
    private func isWord(_ scalar: Unicode.Scalar) -> Bool {
        switch scalar.properties.generalCategory {
        case .decimalNumber, .nonspacingMark, .spacingMark, .enclosingMark, .connectorPunctuation: return true
        default: return scalar.properties.isAlphabetic || scalar.properties.isJoinControl
        }
    }

    typealias Placed = (scalar: Unicode.Scalar, start: Int)

    /// NFC, spaces as one, lower case; each code point with the place it came from.
    private func normalized(_ scalars: ArraySlice<Unicode.Scalar>) -> [Placed] {
        var lower: [Placed] = []
        for (scalar, start) in composed(scalars) {
            if scalar.properties.isWhitespace {
                if lower.last?.scalar != " " { lower.append((" ", start)) }
            } else {
                lower += scalar.properties.lowercaseMapping.unicodeScalars.map { ($0, start) }
            }
        }
        return lower
    }

    /// NFC by runs that compose among themselves: what begins with a starter that no character before it combines with.
    private func composed(_ scalars: ArraySlice<Unicode.Scalar>) -> [Placed] {
        var out: [Placed] = [], first = scalars.startIndex
        while first < scalars.endIndex {
            var end = first + 1
            while end < scalars.endIndex, joinsBefore(scalars[end]) { end += 1 }
            let made = Array(text(scalars[first..<end]).precomposedStringWithCanonicalMapping.unicodeScalars)
            // The first character keeps the run's place, those that stay behind it their own, counted from the end.
            for (i, scalar) in made.enumerated() {
                out.append((scalar, i == 0 ? first : min(max(first, end - made.count + i), end - 1)))
            }
            first = end
        }
        return out
    }

    private func joinsBefore(_ scalar: Unicode.Scalar) -> Bool {
        if scalar.properties.canonicalCombiningClass != .notReordered { return true }
        switch scalar.properties.generalCategory {
        case .nonspacingMark, .spacingMark: return true
        default: return (0x1161...0x1175).contains(scalar.value) || (0x11A8...0x11C2).contains(scalar.value)
        }
    }

    /// The words of `ClipBpe.words`, and within them those of ByteLevel: it splits only what the first two alternatives
    /// hold, a special token's name that came in other letters.
    private func words(_ text: [Placed]) -> [[Placed]] {
        var out: [[Placed]] = [], at = 0
        func matches(_ word: String) -> Bool { text[at...].lazy.map(\.scalar).starts(with: word.unicodeScalars) }
        func run(_ kind: Kind) -> Int { text[at...].firstIndex { Kind($0.scalar) != kind } ?? text.count }
        while at < text.count {
            let kind = Kind(text[at].scalar)
            var ends = [kind == .letter || kind == .other ? run(kind) : at + 1]
            if let name = ["startoftext", "endoftext"].first(where: { matches("<|\($0)|>") }) {
                ends = [at + 2, at + 2 + name.count, at + 4 + name.count]
            } else if let short = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"].first(where: matches) {
                ends = [at + short.count]
            }
            for end in ends {
                if kind != .space { out.append(Array(text[at..<end])) }
                at = end
            }
        }
        return out
    }

    private enum Kind {
        case letter, number, space, other

        init(_ scalar: Unicode.Scalar) {
            switch scalar.properties.generalCategory {
            case .uppercaseLetter, .lowercaseLetter, .titlecaseLetter, .modifierLetter, .otherLetter: self = .letter
            case .decimalNumber, .letterNumber, .otherNumber: self = .number
            default: self = scalar.properties.isWhitespace ? .space : .other
            }
        }
    }

    /// Byte-level BPE of one word: the pair of the lowest rank is merged, the leftmost first, until none is left.
    private func merged(_ word: [Placed]) -> [Token] {
        var symbols: [(text: String, start: Int)] = word.flatMap { placed in
            UTF8.encode(placed.scalar)!.map { (ClipBpe.letters[Int($0)], placed.start) }
        }
        symbols[symbols.count - 1].text += suffix
        var pairs = zip(symbols, symbols.dropFirst()).map { rank($0.text, $1.text) }
        while let best = pairs.compactMap({ $0 }).min(), let at = pairs.firstIndex(of: best) {
            symbols[at].text += symbols.remove(at: at + 1).text
            pairs.remove(at: at)
            if at > 0 { pairs[at - 1] = rank(symbols[at - 1].text, symbols[at].text) }
            if at < pairs.count { pairs[at] = rank(symbols[at].text, symbols[at + 1].text) }
        }
        return symbols.compactMap { symbol in (vocab[Exact(symbol.text)] ?? unknown).map { ($0, symbol.start) } }
    }

    private func rank(_ left: String, _ right: String) -> Int? { ranks[Exact("\(left) \(right)")] }

    /// GPT-2's printable stand-ins for bytes (Radford et al. 2019).
    private static let letters: [String] = {
        let seen = Array(33...126) + Array(161...172) + Array(174...255)
        var hidden: UInt32 = 256
        return (0..<256).map { byte in
            if seen.contains(byte) { return String(Unicode.Scalar(UInt8(byte))) }
            defer { hidden += 1 }
            return String(Unicode.Scalar(hidden)!)
        }
    }()
}
