import Foundation

/// The axes a policy may look at, in the table's order (docs/policies.md).
enum Axis: String, CaseIterable {
    case thermal, charging, saver, headroom, battery
    case freeMemoryBytes = "free_memory_bytes", deadlineS = "deadline_s", secondsPerCall = "seconds_per_call"
    case affordableCalls = "affordable_calls"
}

/// Stands for "as much as one could want" where nothing is known.
let unbounded = Double(Json.maxInt)

/// Where a state lies on the axes. Sets are numbers too: thermal 0..3 coolest first, flags 0 or 1.
typealias Point = [Axis: Double]

/// A policy as data: the first row whose conditions hold is the answer (edgesd/runtime/policy.py).
public struct Policy: Sendable {
    static let format = "edgesd-policy-1"
    static let maxBytes = 1 << 18, maxRows = 64

    public let name, about: String
    /// How long it must be better before it counts.
    public let dwellS: Double
    public let rows: [PolicyRow]

    func match(_ point: Point) -> PolicyRow? { rows.first { $0.when.holds(point) } }

    /// The axes that any row looks at, in order.
    var axes: [Axis] { Axis.allCases.filter { axis in rows.contains { $0.when.conditions[axis] != nil } } }
}

/// level: 0 where all is well, higher = worse. reason: a sentence for the user.
public struct PolicyRow: Sendable {
    public let name, reason: String
    public let level: Int
    let when: When
    public let then: Outcome
}

/// Conditions that must all hold: intervals are closed, sets are lists of values.
struct When: Sendable {
    enum Condition: Sendable {
        case oneOf([Double]), between(Double, Double?)

        func holds(_ value: Double) -> Bool {
            switch self {
            case .oneOf(let allowed): return allowed.contains(value)
            case .between(let low, let high): return value >= low && high.map { value <= $0 } ?? true
            }
        }
    }

    let conditions: [Axis: Condition]

    func holds(_ point: Point) -> Bool { conditions.allSatisfy { $0.value.holds(point[$0.key]!) } }
}

/// What a picture gets. guidanceUntil: share of the steps with guidance. coolDownS: rest before going on.
public struct Outcome: Sendable, Equatable {
    public var steps: Int
    public var width = 1.0, guidanceUntil = 1.0
    public var tile = false, upscaler = false, refiner = false
    public var coolDownS = 0.0
}

/// What the user allows and the bundle offers. steps, widths: offered, ascending.
public struct Limits: Sendable {
    public var steps = Array(1...1000)
    public var widths = [1.0]
    public var minSteps = 1, maxSteps = 1000
    public var minWidth = 0.0, maxWidth = 1.0
    public var minGuidanceUntil = 0.0, maxGuidanceUntil = 1.0
    public var tile = false, upscaler = false, refiner = false

    public init() {}

    var allowedSteps: [Int] { steps.filter { (minSteps...max(minSteps, maxSteps)).contains($0) } }
    var allowedWidths: [Double] { widths.filter { $0 >= minWidth && $0 <= maxWidth } }

    /// RequestError where nothing is left to choose.
    public func checked() throws -> Limits {
        let shownSteps = steps.prefix(20).map(String.init).joined(separator: ", ")
        let rules: [(Bool, String, String)] = [
            (minSteps <= maxSteps && !allowedSteps.isEmpty, "steps from \(minSteps) to \(maxSteps)", shownSteps),
            (minWidth <= maxWidth && !allowedWidths.isEmpty, "width from \(plain(minWidth)) to \(plain(maxWidth))",
             widths.map(plain).joined(separator: ", ")),
            (minGuidanceUntil <= maxGuidanceUntil, "guidance until \(plain(minGuidanceUntil)) to \(plain(maxGuidanceUntil))", "0 to 1"),
        ]
        for (good, came, allowed) in rules where !good {
            throw requestError(came, "a range that holds one of \(allowed)", "Widen the floor or the ceiling")
        }
        return self
    }
}

/// What a picture gets and why. capped: what the policy wanted and limits did not give. assumed: axes that the device
/// did not tell and the table looks at. betterSinceS: since when it has been better than `row` says.
public struct Decision: Sendable, Equatable {
    public var steps: Int
    public var width, guidanceUntil: Double
    public var tile, upscaler, refiner: Bool
    public var coolDownS: Double
    public var reason, row: String
    public var level: Int
    public var timeS: Double
    public var capped: [String] = []
    public var assumed: [String] = []
    public var betterSinceS: Double?
}

/// Where a state lies, and the axes that are not known and count as nominal.
func point(_ state: DeviceState) -> (values: Point, unknown: [Axis]) {
    var known: Point = [:]
    known[.thermal] = DeviceState.thermalWords.firstIndex(of: state.thermal).map(Double.init)
    known[.charging] = state.charging.map { $0 ? 1 : 0 }
    known[.saver] = state.saver.map { $0 ? 1 : 0 }
    known[.headroom] = state.headroom
    known[.battery] = state.battery
    known[.freeMemoryBytes] = state.freeMemoryBytes
    known[.deadlineS] = state.deadlineS
    known[.secondsPerCall] = state.secondsPerCall[1]
    if let deadline = state.deadlineS, let seconds = state.secondsPerCall[1] {
        known[.affordableCalls] = min(deadline / seconds, unbounded)
    }
    // A battery that is known but not said to be charging is taken to run down; no battery at all means the mains.
    let nominal: Point = [
        .thermal: 0, .charging: state.battery == nil ? 1 : 0, .saver: 0, .headroom: 0, .battery: 1,
        .freeMemoryBytes: unbounded, .deadlineS: unbounded, .secondsPerCall: 0, .affordableCalls: unbounded,
    ]
    return (nominal.merging(known) { $1 }, Axis.allCases.filter { known[$0] == nil })
}

extension Policy {
    /// The row in force, capped by the limits. Worse counts at once, better only after `dwellS` without a break.
    /// previous: the last decision of this policy. Pure: the same arguments, the same answer.
    public func decide(_ state: DeviceState, previous: Decision? = nil, limits: Limits = Limits()) throws -> Decision {
        let (values, unknown) = point(state)
        guard var row = match(values) else {  // the check at load leaves no gap
            throw dataError("policy \(name) says nothing for this device", "a table without gaps", "Check it at load")
        }
        var since: Double?
        if let previous, let kept = rows.first(where: { $0.name == previous.row }), row.level < kept.level {
            var from = min(previous.betterSinceS ?? state.timeS, state.timeS)
            if state.timeS < previous.timeS { from = state.timeS }  // the clock began anew
            if state.timeS - from < dwellS {
                row = kept
                since = from
            }
        }
        let limits = try limits.checked(), then = row.then
        var given = then
        given.steps = nearest(then.steps, limits.allowedSteps)
        given.width = nearest(then.width, limits.allowedWidths)
        given.guidanceUntil = max(limits.minGuidanceUntil, min(limits.maxGuidanceUntil, then.guidanceUntil))
        given.tile = then.tile && limits.tile
        given.upscaler = then.upscaler && limits.upscaler
        given.refiner = then.refiner && limits.refiner
        let parts = [
            ("steps", given.steps == then.steps), ("width", given.width == then.width),
            ("guidance_until", given.guidanceUntil == then.guidanceUntil), ("tile", given.tile == then.tile),
            ("upscaler", given.upscaler == then.upscaler), ("refiner", given.refiner == then.refiner),
        ]
        return Decision(
            steps: given.steps, width: given.width, guidanceUntil: given.guidanceUntil, tile: given.tile,
            upscaler: given.upscaler, refiner: given.refiner, coolDownS: given.coolDownS, reason: row.reason,
            row: row.name, level: row.level, timeS: state.timeS, capped: parts.filter { !$0.1 }.map(\.0),
            assumed: axes.filter(unknown.contains).map(\.rawValue), betterSinceS: since)
    }
}

/// The largest that is not above what is wanted, else the smallest there is.
private func nearest<T: Comparable>(_ wanted: T, _ allowed: [T]) -> T {
    allowed.filter { $0 <= wanted }.max() ?? allowed.min()!
}

/// MACs of a UNet call at a width over those at 1, for SD 1.5's shape.
public func widthCost(_ width: Double) -> Double { 1 - 0.86 * (1 - width) }

/// UNet work of a picture in calls at full width.
func cost(_ then: Outcome) -> Double { Double(then.steps) * (1 + then.guidanceUntil) * widthCost(then.width) }
