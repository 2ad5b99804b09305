import Foundation
import XCTest

@testable import EdgeSD

final class SamplingTests: XCTestCase {
    func testNoiseIsPythonsToOneUlp() throws {
        for entry in try Golden.read("noise").list("philox") {
            let purpose = Purpose(rawValue: UInt32(entry.whole("purpose")))!
            let made = try Philox(seed: entry.whole("seed")).normal(
                entry["shape"]!.ints, image: UInt32(entry.whole("image")), row: UInt32(entry.whole("row")), purpose: purpose)
            for (a, b) in zip(made.values, entry["normal"]!.floats) { XCTAssertLessThanOrEqual(abs(a - b), b.ulp) }
            XCTAssertEqual(made.count, entry.list("normal").count)
        }
        assertRefused(.request, "seed -1") { _ = try Philox(seed: -1) }
        assertRefused(.request) { _ = try Philox(seed: 1 << 53) }
    }

    /// The fixed function in place of the UNet: float64, rounded once.
    static func model(_ sample: Tensor, _ timestep: Float) -> Tensor {
        Tensor(sample.shape, sample.values.map { u in
            let u = Double(u)
            return Float((1.2 * u + 0.0001 * Double(timestep)) / (1 + 0.5 * u * u))
        })
    }

    struct Case {
        let golden: Json
        let shape: [Int]
        let source: Philox

        init(_ golden: Json) throws {
            self.golden = golden
            shape = golden["shape"]!.ints
            source = try Philox(seed: golden.whole("seed"))
        }

        func tensor(_ json: Json) -> Tensor { Tensor(shape, json.floats) }

        func steps(_ loop: Loop) throws -> [Step] {
            var loop = loop, steps: [Step] = []
            let table = loop.table
            while let step = loop.next(
                denoise: { SamplingTests.model($0, table.timestep[$1]) },
                noise: { source.normal(shape, row: UInt32($0), purpose: .step) }) { steps.append(step) }
            return steps
        }

        var start: Tensor { source.normal(shape, row: 0, purpose: .start) }
    }

    private func file(_ golden: Json) throws -> TableFile {
        try TableFile([UInt8](Data(base64Encoded: golden.text("file_base64"))!))
    }

    private func check(_ run: Json, _ table: SamplerTable, _ golden: Case, _ label: String) throws {
        let start = run.whole("start"), begin = golden.tensor(run["begin"]!)
        let made = start == 0 ? initLatents(table, golden.start)
            : addNoise(table, start, golden.tensor(golden.golden["x0"]!), golden.start)
        XCTAssertLessThan(relative(made.values, begin.values), 1e-5, label)
        let steps = try golden.steps(Loop(table, latents: begin, start: start))
        XCTAssertLessThan(relative(steps[0].denoised.values, run["first_x0"]!.floats), 1e-5, label)
        XCTAssertLessThan(relative(steps.last!.latents.values, run["final"]!.floats), 1e-5, label)
        guard let resume = run["resume"] else { return }
        let state = RunState(row: resume.whole("row"), start: resume.whole("start"),
                             inputs: resume.list("inputs").map(golden.tensor), outputs: resume.list("outputs").map(golden.tensor))
        let rest = try golden.steps(Loop(table, state))
        XCTAssertEqual(rest.count, table.rows - state.row, label)
        XCTAssertLessThan(relative(rest.last!.latents.values, run["final"]!.floats), 1e-5, label)
        // Left and gone on from its own file, a run ends in the same bits.
        let mine = steps[state.row - 1].state
        let again = try SavedRun(SavedRun(table, mine, owner: "me").dumped()).fitting(table, owner: "me")
        XCTAssertEqual(try golden.steps(Loop(table, again)).last!.latents, steps.last!.latents, label)
    }

    func testTwelveSamplersAtFourStepCounts() throws {
        let golden = try Golden.read("grid"), file = try file(golden)
        var seen: Set<String> = []
        for run in golden.list("runs") {
            let label = "\(run.text("sampler")) \(run.whole("steps"))"
            seen.insert(label)
            let table = try XCTUnwrap(file.table(run.text("sampler"), steps: run.whole("steps")), label)
            try check(run, table, Case(golden), label)
        }
        XCTAssertEqual(seen.count, 48)
    }

    func testTablesRunsAndResumesOfEveryKind() throws {
        let golden = try Golden.read("sampling"), file = try file(golden)
        let tables = try golden.list("tables").map { json -> SamplerTable in
            let table = try XCTUnwrap(file.table(json.text("name"), steps: json.whole("steps")))
            XCTAssertEqual(table.timestep, json["timestep"]!.floats)
            XCTAssertEqual(table.alpha, json["alpha"]!.floats)
            XCTAssertEqual(table.sigma, json["sigma"]!.floats)
            XCTAssertEqual(table.shared.inputCoef, json.list("input_coef").map(\.floats))
            XCTAssertEqual(table.shared.outputCoef, json.list("output_coef").map(\.floats))
            XCTAssertEqual(table.shared.noiseCoef, json["noise_coef"]!.floats)
            XCTAssertEqual(table.draws, json.list("draws").map { $0.flag! })
            XCTAssertEqual(table.initScale, Float(json["init_scale"]!.number!))
            XCTAssertEqual(table.starts.keys.sorted().map(String.init), json["starts"]!.object!.fields.map(\.key).sorted { Int($0)! < Int($1)! })
            for (start, rows) in json["starts"]!.object!.fields {
                XCTAssertEqual(table.starts[Int(start)!]!.inputCoef, rows.list("input_coef").map(\.floats))
                XCTAssertEqual(table.starts[Int(start)!]!.outputCoef, rows.list("output_coef").map(\.floats))
                XCTAssertEqual(table.starts[Int(start)!]!.noiseCoef, rows["noise_coef"]!.floats)
            }
            return table
        }
        for run in golden.list("runs") {
            let table = tables[run.whole("table")]
            try check(run, table, Case(golden), "\(table.name) \(table.steps) from \(run.whole("start"))")
        }
    }

    func testBridgesBetweenTables() throws {
        let golden = try Golden.read("sampling"), file = try file(golden), one = try Case(golden)
        let tables = try golden.list("tables").map { try XCTUnwrap(file.table($0.text("name"), steps: $0.whole("steps"))) }
        for entry in golden.list("bridges") {
            let state = bridge(tables[entry.whole("from")], entry.whole("row"), sample: one.tensor(entry["sample"]!),
                               modelOutput: one.tensor(entry["model_output"]!), into: tables[entry.whole("to")])
            XCTAssertEqual(state.row, entry.whole("entry_row"))
            XCTAssertLessThan(relative(state.inputs[0].values, entry["entry"]!.floats), 1e-5)
            let final = try one.steps(Loop(tables[entry.whole("to")], state)).last?.latents ?? state.inputs[0]
            XCTAssertLessThan(relative(final.values, entry["final"]!.floats), 1e-5)
        }
    }

    func testSpoiledTableFilesAreRefused() throws {
        let data = [UInt8](Data(base64Encoded: try Golden.read("sampling").text("file_base64"))!)
        for length in [0, 7, 8, 100, data.count / 2, data.count - 1] { assertRefused(.data) { _ = try TableFile(Array(data[..<length])) } }
        assertRefused(.data) { _ = try TableFile(data + [0]) }
        var long = data
        long[7] = 0xFF
        assertRefused(.data) { _ = try TableFile(long) }
        let whole = try Safetensors(parsing: data)
        for (name, array) in whole.tensors where name.hasPrefix("ddim/") {
            var spoiled = whole
            switch array {
            case .f32(let x): spoiled.tensors[name] = .f32(NDArray([x.count + 1], x.values + [.nan]))
            case .i32(let x): spoiled.tensors[name] = .i32(NDArray(x.shape, x.values.map { -$0 }))
            case .u8(let x): spoiled.tensors[name] = .u8(NDArray(x.shape, x.values.map { _ in 255 }))
            case .i64: continue
            }
            if array.shape != [0] { assertRefused(.data) { _ = try TableFile(spoiled.dumped()) } }
        }
    }

    func testASavedRunOfAnotherKindIsRefused() throws {
        let golden = try Golden.read("sampling"), file = try file(golden)
        let table = try XCTUnwrap(file.table("ddim", steps: 4)), other = try XCTUnwrap(file.table("euler_a", steps: 5))
        let one = try Case(golden)
        let state = try one.steps(Loop(table, latents: one.start))[1].state
        let saved = SavedRun(table, state, owner: "me", told: "é\n")
        XCTAssertEqual(try SavedRun(saved.dumped()).told, "é\n")
        assertRefused(.request, "4 steps of ddim") { _ = try saved.fitting(other, owner: "me") }
        assertRefused(.request, "another picture") { _ = try saved.fitting(table, owner: "you") }
        let wrong = SavedRun(table, RunState(row: 9, start: 0, inputs: state.inputs, outputs: []), owner: "me")
        assertRefused(.data) { _ = try wrong.fitting(table, owner: "me") }
        let path = try temporaryFolder(self).appendingPathComponent("run")
        try Files.writeWhole(path, Array(saved.dumped().dropLast(3)))
        assertRefused(.data) { _ = try SavedRun.read(path) }
    }
}
