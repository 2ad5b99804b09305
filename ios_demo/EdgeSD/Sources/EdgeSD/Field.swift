/// A JSON value with its place in the document, and the exact types a document may ask of it.
struct Field {
    struct Wrong: Error { let place, what: String }

    let json: Json?
    let place: String

    init(_ json: Json?, _ place: String) { (self.json, self.place) = (json, place) }

    func wrong(_ what: String) -> Wrong { Wrong(place: place, what: what) }

    subscript(key: String) -> Field {
        Field(json?.object?[key], place.isEmpty ? key : "\(place).\(key)")
    }

    /// nil where the field is left out; null is a value, and a wrong one.
    func optional(_ key: String) -> Field? {
        let field = self[key]
        return field.json == nil ? nil : field
    }

    /// nil where the field is left out or null.
    func nullable(_ key: String) -> Field? { optional(key).flatMap { $0.json!.isNull ? nil : $0 } }

    func object() throws -> JsonObject {
        guard let object = json?.object else { throw wrong("should be an object") }
        return object
    }

    func list<T>(_ count: ClosedRange<Int>, _ each: (Field) throws -> T) throws -> [T] {
        guard let values = json?.list else { throw wrong("should be a list") }
        guard count.contains(values.count) else {
            throw wrong("\(values.count) entries, not \(count.lowerBound) to \(count.upperBound)")
        }
        return try values.enumerated().map { try each(Field($1, "\(place).\($0)")) }
    }

    /// A list that may be left out.
    func list<T>(_ key: String, _ count: ClosedRange<Int>, _ each: (Field) throws -> T) throws -> [T] {
        try optional(key)?.list(count, each) ?? []
    }

    func whole(_ range: ClosedRange<Int>) throws -> Int {
        guard let value = json?.whole, range.contains(value) else {
            throw wrong("should be a whole number from \(range.lowerBound) to \(range.upperBound)")
        }
        return value
    }

    func count() throws -> Int { try whole(0...Json.maxInt) }

    func number(_ range: ClosedRange<Double> = -Double.infinity...Double.infinity) throws -> Double {
        guard let value = json?.number, value.isFinite, range.contains(value) else {
            throw wrong("should be a number from \(range.lowerBound) to \(range.upperBound)")
        }
        return value
    }

    func flag() throws -> Bool {
        guard let value = json?.flag else { throw wrong("should be true or false") }
        return value
    }

    /// limit: in code points.
    func text(_ limit: Int = 4096) throws -> String {
        guard let value = json?.text, value.unicodeScalars.count <= limit else {
            throw wrong("should be a text of at most \(limit) characters")
        }
        return value
    }

    func oneOf(_ allowed: [String]) throws -> String {
        guard let value = json?.text, allowed.contains(where: { Exact($0) == Exact(value) }) else {
            throw wrong("should be one of \(allowed.joined(separator: ", "))")
        }
        return value
    }

    func name() throws -> String {
        let value = try text(128)
        guard let first = value.utf8.first, isAlphanumeric(first) || first == UInt8(ascii: "_"),
            value.utf8.allSatisfy({ isAlphanumeric($0) || "_.+-".utf8.contains($0) })
        else { throw wrong("should be a name of letters, digits, '_', '.', '+' and '-'") }
        return value
    }

    /// The names of policies and their rows.
    func word() throws -> String {
        let value = try text(40)
        func isSmall(_ byte: UInt8) -> Bool { isAlphanumeric(byte) && !(0x41...0x5A).contains(byte) }
        guard let first = value.utf8.first, isSmall(first),
            value.utf8.allSatisfy({ isSmall($0) || $0 == UInt8(ascii: "_") || $0 == UInt8(ascii: "-") })
        else { throw wrong("should be a word of small letters, digits, '_' and '-'") }
        return value
    }

    func sizePx() throws -> [Int] { try list(2...2) { try $0.whole(1...1 << 24) } }

    func sha256() throws -> String {
        let value = try text(64)
        guard value.utf8.count == 64,
            value.utf8.allSatisfy({ (0x30...0x39).contains($0) || (0x61...0x66).contains($0) })
        else { throw wrong("should be 64 hex digits") }
        return value
    }

    /// A plain relative path: no `..`, no drive or device, no backslash, no control character, no hidden part.
    func path() throws -> String {
        let value = try text(512)
        guard !value.isEmpty else { throw wrong("a path must have at least 1 character") }
        for part in value.utf8.split(separator: UInt8(ascii: "/"), omittingEmptySubsequences: false) {
            let good = (1...128).contains(part.count) && (isAlphanumeric(part.first!) || part.first == UInt8(ascii: "_"))
                && part.allSatisfy { isAlphanumeric($0) || "._ -".utf8.contains($0) }
                && part.last != UInt8(ascii: ".") && part.last != UInt8(ascii: " ")
            guard good else {
                throw wrong("a path must be relative, of letters, digits, '.', '_', '-', and stay inside the bundle")
            }
            guard !isDevice(String(part)!.lowercased()) else {
                throw wrong("a path must not hold a name that Windows keeps for a device")
            }
        }
        return value
    }
}

private func isAlphanumeric(_ byte: UInt8) -> Bool {
    (0x30...0x39).contains(byte) || (0x41...0x5A).contains(byte) || (0x61...0x7A).contains(byte)
}

/// con, prn, aux, nul, com0-9, lpt0-9, with any extension.
private func isDevice(_ part: String) -> Bool {
    let stem = part.split(separator: ".", omittingEmptySubsequences: false)[0]
    if ["con", "prn", "aux", "nul"].contains(stem) { return true }
    return stem.utf8.count == 4 && (stem.hasPrefix("com") || stem.hasPrefix("lpt")) && stem.last!.isNumber
}
