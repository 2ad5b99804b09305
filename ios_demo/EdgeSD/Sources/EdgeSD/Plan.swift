import Foundation

/// Per row of a table: guidance (1 = none), width (0..1], and whether the unconditional call is made
/// (edgesd/runtime/plan.py). rescale: guidance_rescale phi. earlyStop: end when x0 moves by less than this fraction.
public struct RunPlan: Sendable {
    public static let schedules = ["constant", "linear", "cosine", "interval", "three_stage"]
    static let maxGuidance = 1000.0

    public let guidance, width: [Double]
    public let uncond: [Bool]
    public let rescale: Double
    public let earlyStop: Double?

    /// Guidance follows a schedule over x = row / (rows - 1). until: after this fraction of the rows guidance is 1 and
    /// the unconditional call is not made. switchTo (share of the rows, width): from there on that width.
    public static func make(
        _ kind: String, rows: Int, guidance: Double, until: Double = 1, rescale: Double = 0, width: Double = 1,
        switchTo: WidthSwitch? = nil, earlyStop: Double? = nil
    ) throws -> RunPlan {
        guard schedules.contains(kind) else {
            throw requestError("guidance schedule '\(shown(kind))'", schedules.joined(separator: ", "), "Choose one of these")
        }
        func refuse(_ came: String, _ allowed: String) -> EdgesdError { requestError(came, allowed, "Change the guidance settings") }
        guard rows >= 1, (0...1).contains(until) else { throw refuse("guidance until \(until) of \(rows) rows", "0 to 1") }
        guard (0...maxGuidance).contains(guidance) else { throw refuse("guidance \(guidance)", "0 to 1000") }
        guard width > 0, width <= 1, (0...1).contains(rescale) else { throw refuse("width or rescale", "0 to 1") }
        let scale = (0..<rows).map { row -> Double in
            guard Double(row) < until * Double(rows) else { return 1 }
            let wanted = schedule(kind, Double(row) / Double(max(rows - 1, 1)), guidance)
            return min(max(Double(Float(wanted)), 0), maxGuidance)
        }
        let first = switchTo.map { switchRow(rows, $0.share) } ?? rows
        return RunPlan(
            guidance: scale, width: (0..<rows).map { $0 < first ? width : switchTo!.width }, uncond: scale.map { $0 != 1 },
            rescale: rescale, earlyStop: earlyStop)
    }

    private static func schedule(_ kind: String, _ x: Double, _ guidance: Double) -> Double {
        switch kind {
        case "constant": return guidance
        case "linear": return 1 + 2 * x * (guidance - 1)
        case "cosine": return 1 + (1 - cos(Double.pi * x)) * (guidance - 1)
        case "interval": return (0.2...0.8).contains(x) ? guidance : 1
        default: return 1 + (guidance - 1) * min(max(1 / 3 + (x - 0.2) / 0.4 * 2 / 3, 1 / 3), 1)  // three_stage
        }
    }

    /// The first row that has the second width of a switch after `share` of the run.
    static func switchRow(_ rows: Int, _ share: Double) -> Int {
        min(rows, max(0, Int((share * Double(rows) + 0.5).rounded(.down))))
    }

    /// UNet calls per picture from row `start` on.
    public func calls(from start: Int = 0) -> Int { uncond[min(start, uncond.count)...].reduce(0) { $0 + ($1 ? 2 : 1) } }

    /// Whether earlyStop is set and x0 moved less than that since the row before, in every picture.
    func settled(_ before: Tensor, _ x0: Tensor) -> Bool {
        guard let earlyStop else { return false }
        let size = x0.count / x0.shape[0]
        return (0..<x0.shape[0]).allSatisfy { image in
            var (moved, whole) = (0.0, 0.0)
            for i in image * size..<(image + 1) * size {
                let difference = Double(x0.values[i] - before.values[i])
                moved += difference * difference
                whole += Double(x0.values[i]) * Double(x0.values[i])
            }
            return moved.squareRoot() < earlyStop * whole.squareRoot()
        }
    }
}

/// A change of width within a picture: after `share` of the rows, `width`.
public struct WidthSwitch: Sendable, Equatable {
    public let share, width: Double

    public init(share: Double, width: Double) { (self.share, self.width) = (share, width) }
}

/// Classifier-free guidance on model outputs [B,C,h,w]; rescale: Lin et al. 2023, eqs. 15-16.
public func combine(_ uncond: Tensor, _ cond: Tensor, guidance: Double, rescale: Double = 0) -> Tensor {
    let scale = Float(guidance)
    var guided = Tensor(cond.shape, zip(uncond.values, cond.values).map { $0 + scale * ($1 - $0) })
    guard rescale != 0 else { return guided }
    let size = cond.count / cond.shape[0]
    for image in 0..<cond.shape[0] {
        let range = image * size..<(image + 1) * size
        let ratio = Float(deviation(cond.values[range]) / deviation(guided.values[range]))
        let (share, rest) = (Float(rescale), Float(1 - rescale))
        for i in range {
            let value: Float = guided.values[i]
            guided.values[i] = share * (value * ratio) + rest * value
        }
    }
    return guided
}

private func deviation(_ values: ArraySlice<Float>) -> Double {
    let mean = values.reduce(0.0) { $0 + Double($1) } / Double(values.count)
    let squares = values.reduce(0.0) { (sum: Double, value: Float) -> Double in
        let off = Double(value) - mean
        return sum + off * off
    }
    return (squares / Double(values.count - 1)).squareRoot()
}
