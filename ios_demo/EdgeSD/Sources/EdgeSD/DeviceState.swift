/// What the device feels like right now; nil = not known (edgesd/runtime/device.py).
///
/// battery: charge 0..1. saver: the system saves power. thermal: Apple's four words, or "unknown". headroom: 0 cool, 1
/// where the system throttles. deadlineS: time the whole picture may take. secondsPerCall: of the UNet by width.
/// timeS: a monotonic clock.
public struct DeviceState: Sendable, Equatable {
    public static let thermalWords = ["nominal", "fair", "serious", "critical"]

    public var battery: Double?
    public var charging, saver: Bool?
    public var thermal = "unknown"
    public var headroom: Double?
    public var freeMemoryBytes: Double?
    public var deadlineS: Double?
    public var secondsPerCall: [Double: Double] = [:]
    public var timeS = 0.0

    public init() {}

    /// A reading as JSON: the fields above, any left out; widths are strings there. DataError for anything else.
    public init(json: Json) throws {
        let known: Set = ["battery", "charging", "saver", "thermal", "headroom", "free_memory_bytes", "deadline_s",
                          "seconds_per_call", "time_s"]
        let at = Field(json, "device state")
        do {
            guard try at.object().fields.allSatisfy({ known.contains($0.key) }) else { throw at.wrong("an unknown field") }
            battery = try at.nullable("battery")?.number(0...1)
            charging = try at.nullable("charging")?.flag()
            saver = try at.nullable("saver")?.flag()
            thermal = try at.optional("thermal")?.oneOf(DeviceState.thermalWords + ["unknown"]) ?? thermal
            headroom = try at.nullable("headroom")?.number(0...Double.infinity)
            freeMemoryBytes = try at.nullable("free_memory_bytes")?.number(0...Double.infinity)
            deadlineS = try at.nullable("deadline_s")?.number(0...Double.infinity)
            timeS = try at.nullable("time_s")?.number(0...Double.infinity) ?? 0
            for (width, _) in try at.optional("seconds_per_call")?.object().fields ?? [] {
                let seconds = try at["seconds_per_call"][width].number(0...Double.infinity)
                guard let share = Double(width), share > 0, share <= 1, seconds > 0 else { throw at.wrong("seconds_per_call") }
                secondsPerCall[share] = seconds
            }
        } catch let error as Field.Wrong {
            throw dataError("a device state that does not read (\(error.place): \(error.what))",
                            known.sorted().joined(separator: ", "), "Correct the JSON")
        }
    }

    /// Each figure from the first state that knows it; secondsPerCall by width; timeS: the latest.
    public static func merged(_ states: DeviceState...) -> DeviceState {
        var found = DeviceState()
        for state in states {
            found.battery = found.battery ?? state.battery
            found.charging = found.charging ?? state.charging
            found.saver = found.saver ?? state.saver
            if found.thermal == "unknown" { found.thermal = state.thermal }
            found.headroom = found.headroom ?? state.headroom
            found.freeMemoryBytes = found.freeMemoryBytes ?? state.freeMemoryBytes
            found.deadlineS = found.deadlineS ?? state.deadlineS
            found.secondsPerCall.merge(state.secondsPerCall) { mine, _ in mine }
            found.timeS = max(found.timeS, state.timeS)
        }
        return found
    }
}
