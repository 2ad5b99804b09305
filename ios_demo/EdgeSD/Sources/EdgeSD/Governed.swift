import Foundation

/// What a policy changed before the step that follows `rowsRun` finished rows (edgesd/runtime/governed.py).
public struct Change: Sendable, Equatable {
    public enum Kind: String, Sendable { case shorten, unguide, narrow, pause }

    public let rowsRun: Int
    public let kind: Kind
    public let steps: Int
    public let width, guidanceUntil, seconds: Double
    public let reason: String

    /// One line for people.
    public var told: String {
        let what: String
        switch kind {
        case .shorten: what = "shortened to \(steps) steps"
        case .narrow: what = "narrowed to width \(plain(width))"
        case .unguide: what = "guidance ends at \(Int((guidanceUntil * 100).rounded())) % of the run"
        case .pause: what = "waited \(plain(seconds)) s"
        }
        return "\(what) after row \(rowsRun): \(reason)"
    }

    var json: Json {
        .object(JsonObject([
            ("rows_run", .int(rowsRun)), ("kind", .string(kind.rawValue)), ("steps", .int(steps)),
            ("width", .double(width)), ("guidance_until", .double(guidanceUntil)), ("seconds", .double(seconds)),
            ("reason", .string(reason)),
        ]))
    }

    init(rowsRun: Int, kind: Kind, steps: Int, width: Double, guidanceUntil: Double, seconds: Double, reason: String) {
        (self.rowsRun, self.kind, self.steps, self.width) = (rowsRun, kind, steps, width)
        (self.guidanceUntil, self.seconds, self.reason) = (guidanceUntil, seconds, reason)
    }

    init(_ at: Field) throws {
        let width = try at["width"].number(0...1)
        guard width > 0 else { throw at.wrong("width") }
        self.init(
            rowsRun: try at["rows_run"].whole(0...1 << 16),
            kind: Kind(rawValue: try at["kind"].oneOf(["shorten", "unguide", "narrow", "pause"]))!,
            steps: try at["steps"].whole(1...1000), width: width, guidanceUntil: try at["guidance_until"].number(0...1),
            seconds: try at["seconds"].number(0...Double.infinity), reason: try at["reason"].text(400))
    }
}

/// Asked before the step that follows `rowsRun` rows and `calls` UNet rows; a pause is already over when it returns.
public protocol Governor: AnyObject {
    func ask(rowsRun: Int, calls: Int) throws -> [Change]
}

/// The recorded changes again, each at its row. Pauses are told and not waited.
public final class Replay: Governor {
    private let changes: [Change]

    public init(_ changes: [Change]) { self.changes = changes }

    public func ask(rowsRun: Int, calls: Int) -> [Change] { changes.filter { $0.rowsRun == rowsRun } }
}

/// A policy in charge of pictures drawn one after another, on sensors that `sense` reads. Within a picture steps, width
/// and guidance only fall, and width at most once; hysteresis spans pictures. clock and sleep: seconds, from outside.
public final class PolicyRun: Governor {
    private static let learning = 0.3  // weight of the newest call in the running mean of seconds per call

    public let policy: Policy
    public let limits: Limits
    /// What was last sensed, and what was made of it: for the screen that tells why.
    public private(set) var state: DeviceState
    public private(set) var now: Decision?
    private let sense: () -> DeviceState
    private let clock: () -> Double
    private let sleep: (Double) throws -> Void
    private let share: (Double) -> Double
    private var known: DeviceState
    private var given: Decision?
    private var waited: [Change] = []
    private var mark: (time: Double, calls: Int)?
    private var narrowed = false

    public init(
        _ policy: Policy, limits: Limits, deadlineS: Double? = nil, sense: @escaping () -> DeviceState,
        clock: @escaping () -> Double = { ProcessInfo.processInfo.systemUptime },
        sleep: @escaping (Double) throws -> Void = { Thread.sleep(forTimeInterval: $0) },
        share: @escaping (Double) -> Double = widthCost
    ) {
        (self.policy, self.limits, self.sense, self.clock) = (policy, limits, sense, clock)
        (self.sleep, self.share) = (sleep, share)
        known = DeviceState()
        known.deadlineS = deadlineS
        state = known
    }

    /// What the next picture gets, after the rest that the table asks for. Tell the picture's settings so.
    public func begin() throws -> Decision {
        var decision = try decide()
        (waited, mark, narrowed) = ([], nil, false)
        if decision.coolDownS > 0 {
            waited.append(try pause(0, decision, decision))
            decision = try decide()
        }
        given = decision
        return decision
    }

    /// The picture begun switches width by its plan: that was its one change of width.
    public func planSwitch() { narrowed = true }

    /// The first row's time is not learned: it holds the loading of the model.
    public func ask(rowsRun: Int, calls: Int) throws -> [Change] {
        guard rowsRun > 0, let before = given else { return waited }
        learn(calls)
        let wanted = try decide()
        var made: [Change] = []
        fall(before, wanted, rowsRun, &made)
        if wanted.level > before.level, wanted.coolDownS > 0 { made.append(try pause(rowsRun, before, wanted)) }
        mark = (clock(), calls)
        return made
    }

    /// The decision now in force is each part the lower of both; what fell goes into `made`.
    private func fall(_ before: Decision, _ wanted: Decision, _ rowsRun: Int, _ made: inout [Change]) {
        var now = before
        now.steps = min(before.steps, wanted.steps)
        now.width = narrowed ? before.width : min(before.width, wanted.width)
        now.guidanceUntil = min(before.guidanceUntil, wanted.guidanceUntil)
        now.level = max(before.level, wanted.level)
        narrowed = narrowed || now.width < before.width
        let parts: [(Change.Kind, Bool)] = [
            (.narrow, now.width < before.width), (.shorten, now.steps < before.steps),
            (.unguide, now.guidanceUntil < before.guidanceUntil && now.steps == before.steps),
        ]
        for (kind, fell) in parts where fell {
            made.append(Change(rowsRun: rowsRun, kind: kind, steps: now.steps, width: now.width,
                               guidanceUntil: now.guidanceUntil, seconds: 0, reason: wanted.reason))
        }
        given = now
    }

    private func decide() throws -> Decision {
        state = DeviceState.merged(known, sense())
        let decision = try policy.decide(state, previous: now, limits: limits)
        now = decision
        return decision
    }

    private func pause(_ rowsRun: Int, _ given: Decision, _ why: Decision) throws -> Change {
        try sleep(why.coolDownS)
        return Change(rowsRun: rowsRun, kind: .pause, steps: given.steps, width: given.width,
                      guidanceUntil: given.guidanceUntil, seconds: why.coolDownS, reason: why.reason)
    }

    /// Running mean of seconds per call, from the time and calls since the last question.
    private func learn(_ calls: Int) {
        guard let mark, calls > mark.calls, let given else { return }
        let seconds = (clock() - mark.time) / Double(calls - mark.calls)
        guard seconds > 0 else { return }
        let whole = seconds / share(given.width), mean = known.secondsPerCall[1] ?? whole
        known.secondsPerCall = [1: mean + PolicyRun.learning * (whole - mean)]
    }
}
