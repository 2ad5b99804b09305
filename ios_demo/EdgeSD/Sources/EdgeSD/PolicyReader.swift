import Foundation

/// Bytes to a checked `Policy`. Unknown fields are refused, unlike in a manifest: a condition that is not understood
/// must not count as true.
extension Policy {
    /// The policies that ship with this package.
    public static let shipped = ["balanced", "battery", "deadline", "quality", "seed"]

    /// A shipped policy by name.
    public static func load(_ name: String) throws -> Policy {
        guard shipped.contains(name), let url = Foundation.Bundle.module.url(forResource: name, withExtension: "json", subdirectory: "policies"),
            let data = try? Data(contentsOf: url)
        else { throw requestError("policy '\(shown(name, limit: 60))'", shipped.joined(separator: ", "), "Choose one of these") }
        return try parse([UInt8](data))
    }

    /// DataError for what does not parse, has gaps, or gets dearer as things get worse.
    public static func parse(_ data: [UInt8]) throws -> Policy {
        let fix = "Correct the table as docs/policies.md describes"
        guard data.count <= maxBytes else { throw dataError("a policy of more than \(maxBytes) bytes", "up to \(maxBytes)", fix) }
        let json = try Json.parse(data, orElse: dataError("a policy that is no JSON", "a table of format \(format)", fix))
        let policy: Policy
        do { policy = try Policy(Field(json, "")) } catch let error as Field.Wrong {
            throw dataError("policy: \(shown(error.place, limit: 80)): \(shown(error.what))", "a table of format \(format)", fix)
        }
        try check(policy)
        return policy
    }

    private init(_ at: Field) throws {
        try at.only(["format", "name", "about", "dwell_s", "rows"])
        _ = try at.optional("format")?.oneOf([Policy.format])
        name = try at["name"].word()
        about = try at["about"].sentence()
        dwellS = try at.optional("dwell_s")?.number(0...3600) ?? 30
        rows = try at["rows"].list(1...Policy.maxRows) { row in
            try row.only(["name", "level", "when", "then", "reason"])
            return PolicyRow(
                name: try row["name"].word(), reason: try row["reason"].sentence(), level: try row["level"].whole(0...63),
                when: try row.optional("when").map(When.init) ?? When(conditions: [:]), then: try Outcome(row["then"]))
        }
    }
}

extension When {
    fileprivate init(_ at: Field) throws {
        try at.only(Set(Axis.allCases.map(\.rawValue)))
        var found: [Axis: Condition] = [:]
        for axis in Axis.allCases {
            guard let field = at.nullable(axis.rawValue) else { continue }
            switch axis {
            case .thermal:
                let words = try field.list(1...1024) { try $0.oneOf(DeviceState.thermalWords) }
                found[axis] = .oneOf(words.map { Double(DeviceState.thermalWords.firstIndex(of: $0)!) })
            case .charging, .saver:
                found[axis] = .oneOf(try field.list(1...2) { try $0.flag() ? 1 : 0 })
            default:
                let ends = try field.list(2...2) { (end: Field) -> Double? in
                    try end.json?.isNull == true ? nil : end.number(0...unbounded)
                }
                guard let low = ends[0] else { throw field.wrong("should begin with a number") }
                guard ends[1].map({ low <= $0 }) ?? true else { throw field.wrong("is empty") }
                found[axis] = .between(low, ends[1])
            }
        }
        conditions = found
    }
}

extension Outcome {
    fileprivate init(_ at: Field) throws {
        try at.only(["steps", "width", "guidance_until", "tile", "upscaler", "refiner", "cool_down_s"])
        steps = try at["steps"].whole(1...1000)
        if let given = at.optional("width") {
            width = try given.number(0...1)
            guard width > 0 else { throw given.wrong("should be above 0") }
        }
        guidanceUntil = try at.optional("guidance_until")?.number(0...1) ?? guidanceUntil
        tile = try at.optional("tile")?.flag() ?? tile
        upscaler = try at.optional("upscaler")?.flag() ?? upscaler
        refiner = try at.optional("refiner")?.flag() ?? refiner
        coolDownS = try at.optional("cool_down_s")?.number(0...3600) ?? coolDownS
    }
}

extension Field {
    fileprivate func only(_ known: Set<String>) throws {
        for (key, _) in try object().fields where !known.contains(key) {
            throw wrong("'\(key)' is not known here")
        }
    }

    fileprivate func sentence() throws -> String {
        let value = try text(400)
        guard !value.isEmpty else { throw wrong("should not be empty") }
        return value
    }
}
