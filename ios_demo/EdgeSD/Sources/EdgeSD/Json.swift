import Foundation

/// A string compared byte by byte. Swift's own `==` takes "é" and "e + accent" for one; a key or a token must not.
public struct Exact: Hashable, Sendable {
    let utf8: [UInt8]

    public init(_ text: String) { utf8 = Array(text.utf8) }
}

/// JSON as bundles may hold it: RFC 8259, strict UTF-8, no key twice, no NaN, no infinity, no integer beyond 2^53 - 1,
/// no lone surrogate, at most 200 levels deep. Foundation's decoder takes several of these without a word.
public enum Json: Sendable {
    case null, bool(Bool), int(Int), double(Double), string(String), array([Json]), object(JsonObject)

    /// What is wrong with a text; the caller says of which file.
    public struct Malformed: Error { public let reason: String }

    public static let maxInt = (1 << 53) - 1
    static let maxDepth = 200

    public static func parse(_ data: [UInt8]) throws -> Json {
        var reader = JsonReader(bytes: data)
        return try reader.document()
    }

    /// For files that edgesd itself may have written: DataError with these words where the text is no JSON.
    static func parse(_ data: [UInt8], orElse error: @autoclosure () -> EdgesdError) throws -> Json {
        do { return try parse(data) } catch is Malformed { throw error() }
    }

    public var text: String? { if case .string(let value) = self { return value } else { return nil } }
    public var flag: Bool? { if case .bool(let value) = self { return value } else { return nil } }
    public var whole: Int? { if case .int(let value) = self { return value } else { return nil } }
    public var list: [Json]? { if case .array(let value) = self { return value } else { return nil } }
    public var object: JsonObject? { if case .object(let value) = self { return value } else { return nil } }
    public var isNull: Bool { if case .null = self { return true } else { return false } }

    /// A number of either kind; `true` is none.
    public var number: Double? {
        switch self {
        case .int(let value): return Double(value)
        case .double(let value): return value
        default: return nil
        }
    }

    public subscript(key: String) -> Json? { object?[key] }
}

/// An object's fields in the order they came.
public struct JsonObject: Sendable {
    public private(set) var fields: [(key: String, value: Json)] = []
    private var places: [Exact: Int] = [:]

    public init() {}

    public init(_ pairs: [(String, Json)]) {
        for (key, value) in pairs { _ = insert(key, value) }
    }

    public subscript(key: String) -> Json? { places[Exact(key)].map { fields[$0].value } }

    /// False where the key is there already.
    mutating func insert(_ key: String, _ value: Json) -> Bool {
        guard places.updateValue(fields.count, forKey: Exact(key)) == nil else { return false }
        fields.append((key, value))
        return true
    }
}

private struct JsonReader {
    let bytes: [UInt8]
    var at = 0

    mutating func document() throws -> Json {
        // Swift mends what is no UTF-8, so a text that comes back changed was none.
        guard String(decoding: bytes, as: UTF8.self).utf8.elementsEqual(bytes) else { throw bad("no UTF-8") }
        let value = try self.value(depth: 0)
        skipSpace()
        guard at == bytes.count else { throw bad("text behind the end") }
        return value
    }

    func bad(_ reason: String) -> Json.Malformed { Json.Malformed(reason: "\(reason), at byte \(at)") }

    var next: UInt8? { at < bytes.count ? bytes[at] : nil }

    mutating func skipSpace() {
        while let byte = next, byte == 0x20 || byte == 0x0A || byte == 0x0D || byte == 0x09 { at += 1 }
    }

    mutating func take(_ byte: UInt8) -> Bool {
        guard next == byte else { return false }
        at += 1
        return true
    }

    mutating func word(_ text: String, _ value: Json) throws -> Json {
        guard bytes[at...].starts(with: text.utf8) else { throw bad("an unknown word") }
        at += text.utf8.count
        return value
    }

    mutating func value(depth: Int) throws -> Json {
        guard depth <= Json.maxDepth else { throw bad("more than \(Json.maxDepth) levels") }
        skipSpace()
        switch next {
        case UInt8(ascii: "{"): return try object(depth: depth)
        case UInt8(ascii: "["): return try array(depth: depth)
        case UInt8(ascii: "\""): return .string(try string())
        case UInt8(ascii: "t"): return try word("true", .bool(true))
        case UInt8(ascii: "f"): return try word("false", .bool(false))
        case UInt8(ascii: "n"): return try word("null", .null)
        case UInt8(ascii: "N"), UInt8(ascii: "I"): throw bad("NaN or infinity is not a number a file may hold")
        case .some: return try number()
        case nil: throw bad("the end where a value should be")
        }
    }

    mutating func array(depth: Int) throws -> Json {
        at += 1
        skipSpace()
        if take(UInt8(ascii: "]")) { return .array([]) }
        var values: [Json] = []
        repeat {
            values.append(try value(depth: depth + 1))
            skipSpace()
        } while take(UInt8(ascii: ","))
        guard take(UInt8(ascii: "]")) else { throw bad("a list without end") }
        return .array(values)
    }

    mutating func object(depth: Int) throws -> Json {
        at += 1
        var found = JsonObject()
        skipSpace()
        if take(UInt8(ascii: "}")) { return .object(found) }
        repeat {
            skipSpace()
            guard next == UInt8(ascii: "\"") else { throw bad("a key that is no text") }
            let key = try string()
            skipSpace()
            guard take(UInt8(ascii: ":")) else { throw bad("a key without a value") }
            guard found.insert(key, try value(depth: depth + 1)) else {
                throw bad("key '\(shown(key, limit: 40))' appears twice")
            }
            skipSpace()
        } while take(UInt8(ascii: ","))
        guard take(UInt8(ascii: "}")) else { throw bad("an object without end") }
        return .object(found)
    }

    mutating func digits() throws {
        let first = at
        while let byte = next, byte >= 0x30, byte <= 0x39 { at += 1 }
        guard at > first else { throw bad("a character that begins no value, or a number without digits") }
    }

    mutating func number() throws -> Json {
        let first = at
        let negative = take(UInt8(ascii: "-"))
        if negative, next == UInt8(ascii: "I") { throw bad("infinity is not a number a file may hold") }
        let leading = at
        try digits()
        guard bytes[leading] != 0x30 || at == leading + 1 else { throw bad("a number that begins with 0") }
        var isWhole = true
        if take(UInt8(ascii: ".")) {
            isWhole = false
            try digits()
        }
        if take(UInt8(ascii: "e")) || take(UInt8(ascii: "E")) {
            isWhole = false
            if !take(UInt8(ascii: "+")) { _ = take(UInt8(ascii: "-")) }
            try digits()
        }
        if isWhole {
            guard at - leading <= 16, let value = Int(String(decoding: bytes[first..<at], as: UTF8.self)),
                abs(value) <= Json.maxInt
            else { throw bad("an integer beyond 2^53 - 1") }
            return .int(value)
        }
        guard let value = Double(String(decoding: bytes[first..<at], as: UTF8.self)), value.isFinite else {
            throw bad("a value that is not a number a file may hold")
        }
        return .double(value)
    }

    mutating func string() throws -> String {
        at += 1
        var out: [UInt8] = []
        while true {
            guard let byte = next else { throw bad("a text without end") }
            at += 1
            switch byte {
            case UInt8(ascii: "\""): return String(decoding: out, as: UTF8.self)
            case UInt8(ascii: "\\"): try escape(into: &out)
            case 0..<0x20: throw bad("a control character in a text")
            default: out.append(byte)
            }
        }
    }

    mutating func escape(into out: inout [UInt8]) throws {
        guard let byte = next else { throw bad("a text without end") }
        at += 1
        switch byte {
        case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): out.append(byte)
        case UInt8(ascii: "b"): out.append(0x08)
        case UInt8(ascii: "f"): out.append(0x0C)
        case UInt8(ascii: "n"): out.append(0x0A)
        case UInt8(ascii: "r"): out.append(0x0D)
        case UInt8(ascii: "t"): out.append(0x09)
        case UInt8(ascii: "u"):
            var code = try hex4()
            if (0xD800..<0xDC00).contains(code), take(UInt8(ascii: "\\")), take(UInt8(ascii: "u")) {
                let low = try hex4()
                guard (0xDC00..<0xE000).contains(low) else { throw bad("half a surrogate pair") }
                code = 0x10000 + (code - 0xD800) << 10 + (low - 0xDC00)
            }
            guard let scalar = Unicode.Scalar(code) else { throw bad("half a surrogate pair") }
            out.append(contentsOf: UTF8.encode(scalar)!)
        default: throw bad("an unknown escape")
        }
    }

    mutating func hex4() throws -> UInt32 {
        var code: UInt32 = 0
        for _ in 0..<4 {
            guard let byte = next, byte < 0x80, let digit = Character(Unicode.Scalar(byte)).hexDigitValue else {
                throw bad("an unknown escape")
            }
            code = code << 4 + UInt32(digit)
            at += 1
        }
        return code
    }
}

// ---- writing ---------------------------------------------------------------------------------------------------

extension Json {
    /// As text in one line, keys in their order. Numbers as Python's json writes them: `1.0` stays a float.
    public var dumped: String {
        switch self {
        case .null: return "null"
        case .bool(let value): return value ? "true" : "false"
        case .int(let value): return String(value)
        case .double(let value): return "\(value)"
        case .string(let value): return Json.quoted(value)
        case .array(let values): return "[" + values.map(\.dumped).joined(separator: ", ") + "]"
        case .object(let object):
            return "{" + object.fields.map { Json.quoted($0.key) + ": " + $0.value.dumped }.joined(separator: ", ") + "}"
        }
    }

    /// ASCII alone, as Python's json writes it, so that PNG text chunks can hold it.
    static func quoted(_ text: String) -> String {
        var out = "\""
        for unit in text.utf16 {
            switch unit {
            case 0x22: out += "\\\""
            case 0x5C: out += "\\\\"
            case 0x0A: out += "\\n"
            case 0x0D: out += "\\r"
            case 0x09: out += "\\t"
            case 0x20..<0x7F: out.unicodeScalars.append(Unicode.Scalar(unit)!)
            default:
                let hex = String(unit, radix: 16)
                out += "\\u" + String(repeating: "0", count: 4 - hex.count) + hex
            }
        }
        return out + "\""
    }
}
