/// What the widths of a bundle cost and lose, and when changing width within a picture pays (edgesd/runtime/widths.py).
public struct Widths: Sendable {
    private static let bins = 10
    private static let margin = 0.75  // a switch must leave at most this share of the error that its uniform rival has

    /// Share of the widest's MACs a call by width.
    public let macs: [Double: Double]
    let errors: [Double: [Double]]
    let loadCalls: [Double: Double]
    let bytes: [Double: Double]

    /// nil where the UNet comes in one width. DataError for figures that are none.
    static func read(_ manifest: Manifest) throws -> Widths? {
        var variants: [Double: Variant] = [:]
        for variant in try manifest.component("unet").variants where variants[variant.axes.width] == nil {
            variants[variant.axes.width] = variant
        }
        guard variants.count > 1, let widest = variants[1] else { return nil }
        let sizes = Dictionary(manifest.files.map { ($0.path, Double($0.bytes)) }, uniquingKeysWith: { $1 })
        func figures<T>(_ key: String, _ each: (Field) throws -> T) throws -> [Double: T] {
            let at = Field(.object(manifest.quality), "quality")["widths"]
            guard at.json != nil, let field = at.optional(key) else { return [:] }
            let fields = try field.object().fields
            guard fields.count <= 64 else { throw field.wrong("too many widths") }
            return Dictionary(try fields.map { width, _ in
                guard let share = Double(width) else { throw field.wrong("a width that is none") }
                return (share, try each(field[width]))
            }, uniquingKeysWith: { $1 })
        }
        do {
            return Widths(
                macs: variants.mapValues { Double($0.macs) / Double(max(widest.macs, 1)) },
                errors: try figures("sensitivity") { try $0.list(bins...bins) { try $0.number(0...Double.infinity) } },
                loadCalls: try figures("load_calls") { try $0.number(0...Double.infinity) },
                bytes: variants.mapValues { v in min(v.files.reduce(0) { $0 + sizes[$1]! }, 4 * Double(v.params)) })
        } catch is Field.Wrong {
            throw dataError("the manifest's figures of widths do not parse", "what edgesd package writes", "Package it again")
        }
    }

    /// What a call at a width costs of one at 1; one the bundle has not by SD 1.5's shape.
    public func share(_ width: Double) -> Double { macs[width] ?? widthCost(width) }

    /// (first width, switch) that costs no more than a picture of `width` and loses less; nil where none wins.
    public func planSwitch(
        from width: Double, limits: Limits, calls: Double, freeBytes: Double? = nil
    ) -> (first: Double, then: WidthSwitch)? {
        guard let uniform = errors[width] else { return nil }
        let allowed = macs.keys.filter { w in
            (w == 1 || errors[w] != nil) && w >= limits.minWidth && w <= limits.maxWidth
                && freeBytes.map { (bytes[w] ?? 0) <= $0 } ?? true
        }.sorted(by: >)
        var best: (first: Double, then: WidthSwitch)?, least = Widths.margin * uniform.reduce(0, +)
        for first in allowed {
            for second in allowed where second != first {
                for tenths in 1..<Widths.bins {
                    let part = Double(tenths) / Double(Widths.bins)
                    let cost = part * share(first) + (1 - part) * share(second)
                    guard cost + (loadCalls[second] ?? .infinity) / calls <= share(width) else { continue }
                    let error = self.error(first)[..<tenths].reduce(0, +) + self.error(second)[tenths...].reduce(0, +)
                    if error < least { (best, least) = ((first, WidthSwitch(share: part, width: second)), error) }
                }
            }
        }
        return best
    }

    private func error(_ width: Double) -> [Double] { errors[width] ?? Array(repeating: 0, count: Widths.bins) }
}
