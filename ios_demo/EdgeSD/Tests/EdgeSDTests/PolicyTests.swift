import Foundation
import XCTest

@testable import EdgeSD

final class PolicyTests: XCTestCase {
    private func limits(_ json: Json) -> Limits {
        var limits = Limits()
        limits.steps = json["steps"]!.ints
        limits.widths = json.list("widths").map { $0.number! }
        (limits.minSteps, limits.maxSteps) = (json.whole("min_steps"), json.whole("max_steps"))
        (limits.minWidth, limits.maxWidth) = (json["min_width"]!.number!, json["max_width"]!.number!)
        (limits.minGuidanceUntil, limits.maxGuidanceUntil) = (json["min_guidance_until"]!.number!, json["max_guidance_until"]!.number!)
        (limits.tile, limits.upscaler, limits.refiner) = (json["tile"]!.flag!, json["upscaler"]!.flag!, json["refiner"]!.flag!)
        return limits
    }

    private func decision(_ json: Json) -> Decision {
        Decision(
            steps: json.whole("steps"), width: json["width"]!.number!, guidanceUntil: json["guidance_until"]!.number!,
            tile: json["tile"]!.flag!, upscaler: json["upscaler"]!.flag!, refiner: json["refiner"]!.flag!,
            coolDownS: json["cool_down_s"]!.number!, reason: json.text("reason"), row: json.text("row"), level: json.whole("level"),
            timeS: json["time_s"]!.number!, capped: json.list("capped").map { $0.text! }, assumed: json.list("assumed").map { $0.text! },
            betterSinceS: json["better_since_s"]!.number)
    }

    func testFiveHundredDecisionsArePythons() throws {
        let golden = try Golden.read("policy")
        let policies = try golden.list("policies").map { try Policy.parse(Array($0.dumped.utf8)) }
        let bounds = golden.list("limits").map(limits)
        let cases = golden.list("cases")
        XCTAssertGreaterThanOrEqual(cases.count, 500)
        for (index, entry) in cases.enumerated() {
            let wanted = decision(entry["decision"]!), state = try DeviceState(json: entry["state"]!)
            var previous: Decision?
            if let before = entry["previous"], !before.isNull {
                previous = wanted
                previous?.row = before.text("row")
                previous?.timeS = before["time_s"]!.number!
                previous?.betterSinceS = before["better_since_s"]!.number
            }
            let made = try policies[entry.whole("policy")].decide(state, previous: previous, limits: bounds[entry.whole("limits")])
            XCTAssertEqual(made, wanted, "case \(index)")
        }
    }

    func testShippedPoliciesAreThoseOfPython() throws {
        let golden = try Golden.read("policy").list("policies")
        for name in Policy.shipped {
            let mine = try Policy.load(name), theirs = try XCTUnwrap(golden.first { $0.text("name") == name })
            XCTAssertEqual(mine.rows.map(\.name), theirs.list("rows").map { $0.text("name") })
            XCTAssertEqual(mine.rows.map(\.then.steps), theirs.list("rows").map { $0["then"]!.whole("steps") })
        }
        assertRefused(.request, "balanced") { _ = try Policy.load("../balanced") }
    }

    func testSpoiledTablesAreRefused() {
        let row = #"{"name": "well", "level": 0, "when": {}, "then": {"steps": 20}, "reason": "r"}"#
        func table(_ rows: String...) -> [UInt8] {
            Array(#"{"name": "t", "about": "a", "rows": [\#(rows.joined(separator: ","))]}"#.utf8)
        }
        func worse(_ when: String, steps: Int, level: Int = 1) -> String {
            #"{"name": "low", "level": \#(level), "when": \#(when), "then": {"steps": \#(steps)}, "reason": "r"}"#
        }
        XCTAssertNoThrow(try Policy.parse(table(worse(#"{"battery": [0, 0.2]}"#, steps: 10), row)))
        let spoiled: [(String, [UInt8])] = [
            ("gap", table(worse(#"{"battery": [0, 0.2]}"#, steps: 10))), ("never reached", table(row, worse(#"{"battery": [0, 0.2]}"#, steps: 10))),
            ("costs", table(worse(#"{"battery": [0, 0.2]}"#, steps: 30), row)), ("gets worse", table(worse(#"{"battery": [0.5, null]}"#, steps: 10), row)),
            ("not known", table(worse(#"{"moon": [0, 1]}"#, steps: 10), row)), ("is empty", table(worse(#"{"battery": [0.5, 0.2]}"#, steps: 10), row)),
            ("different things", table(worse(#"{"battery": [0, 0.2]}"#, steps: 10, level: 0), row)), ("one name", table(row, row)),
            ("no JSON", Array("{".utf8)), ("should be", table(worse(#"{"battery": [true, 1]}"#, steps: 10), row)),
            ("more than", [UInt8](repeating: 0x20, count: 1 << 19)),
        ]
        for (phrase, data) in spoiled { assertRefused(.data, phrase) { _ = try Policy.parse(data) } }
    }

    func testWithinAPictureThingsOnlyFallAndWidthOnce() throws {
        var state = DeviceState(), clock = 0.0, slept: [Double] = []
        state.thermal = "nominal"
        var limits = Limits()
        limits.widths = [0.5, 0.75, 1]
        let run = PolicyRun(try Policy.load("balanced"), limits: limits, sense: {
            var now = state
            now.timeS = clock
            return now
        }, clock: { clock }, sleep: { slept.append($0) })
        let first = try run.begin()
        XCTAssertEqual(try run.ask(rowsRun: 0, calls: 0), [])
        state.thermal = "critical"
        clock = 5
        let made = try run.ask(rowsRun: 3, calls: 6)
        XCTAssertEqual(made.map(\.kind), [.narrow, .shorten, .pause])
        XCTAssertLessThan(made[1].steps, first.steps)
        XCTAssertEqual(slept, [20])
        state.thermal = "nominal"
        clock = 500
        XCTAssertEqual(try run.ask(rowsRun: 4, calls: 8), [])
        XCTAssertEqual(try run.ask(rowsRun: 5, calls: 10), [])
    }
}
