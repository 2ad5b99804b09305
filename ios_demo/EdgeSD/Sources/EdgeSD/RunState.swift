import Foundation

/// All that a run needs to go on at `row`: inputs (u_row first) and outputs (e_{row-1} first), [B,C,h,w]. start: the
/// row it began at, which decides its warm-up. At row == table.rows inputs[0] is the result (edgesd/runtime/state.py;
/// SwiftUI has a State of its own).
public struct RunState: Sendable {
    public let row, start: Int
    public let inputs, outputs: [Tensor]
}

/// The UNet's input at row 0 from standard normals.
public func initLatents(_ table: SamplerTable, _ noise: Tensor) -> Tensor { noise.scaled(table.initScale) }

/// x0 at the noise of a row, as the UNet's input there; at row == table.rows, after the last, x0 itself.
public func addNoise(_ table: SamplerTable, _ row: Int, _ x0: Tensor, _ noise: Tensor) -> Tensor {
    row == table.rows ? x0 : .mix(table.alpha[row], x0, table.sigma[row], noise)
}

/// Leaves `table` after the UNet's call at `row` and enters `other` at its nearest lower noise level. Where no row of
/// `other` lies lower, the state is its end and holds x0.
public func bridge(_ table: SamplerTable, _ row: Int, sample: Tensor, modelOutput: Tensor, into other: SamplerTable) -> RunState {
    let (skip, out) = table.x0Coefficients(row)
    let x0 = Tensor.mix(skip, sample, out, modelOutput)
    let level = Double(table.sigma[row]) / max(Double(table.alpha[row]), 1e-30)
    for entry in [0] + other.starts.keys.sorted()
    where Double(other.sigma[entry]) < level * (1 - 1e-6) * Double(other.alpha[entry]) {
        let (a, s) = (table.alpha[row], table.sigma[row])
        let eps = Tensor(sample.shape, zip(sample.values, x0.values).map { ($0 - a * $1) / s })
        return RunState(row: entry, start: entry, inputs: [addNoise(other, entry, x0, eps)], outputs: [])
    }
    return RunState(row: other.rows, start: 0, inputs: [x0], outputs: [])
}

/// What a file of a paused run holds: a state, the table it is of, whose it is. told: text kept with it; last: the
/// UNet's input and output of the last row, to bridge from. The file is the one Python writes.
public struct SavedRun: Sendable {
    static let format = "edgesd-state-1"
    static let maxBytes = 1 << 30

    public let state: RunState
    public let sampler: String
    public let steps: Int
    public let owner, told: String
    public let last: (sample: Tensor, modelOutput: Tensor)?

    public init(_ table: SamplerTable, _ state: RunState, owner: String = "", told: String = "",
                last: (sample: Tensor, modelOutput: Tensor)? = nil) {
        (self.state, sampler, steps, self.owner) = (state, table.name, table.steps, owner)
        (self.told, self.last) = (told, last)
    }

    public func dumped() -> [UInt8] {
        var tensors: [String: AnyArray] = ["row": .i32(NDArray([2], [Int32(state.row), Int32(state.start)]))]
        for (i, array) in state.inputs.enumerated() { tensors["input_\(i)"] = .f32(array) }
        for (i, array) in state.outputs.enumerated() { tensors["output_\(i)"] = .f32(array) }
        if let last { (tensors["last_0"], tensors["last_1"]) = (.f32(last.sample), .f32(last.modelOutput)) }
        let head = ["format": SavedRun.format, "sampler": sampler, "steps": String(steps), "owner": owner, "told": told]
        return Safetensors(tensors, metadata: head).dumped()
    }

    /// Writes the file so that it appears whole or not at all.
    public func save(_ path: URL) throws { try Files.writeWhole(path, dumped()) }

    /// Reads a file, whosever it is. DataError when it is broken.
    public static func read(_ path: URL) throws -> SavedRun {
        let data = try Files.read(path.path, limit: maxBytes + 1)
        do { return try SavedRun(data) } catch {
            throw dataError("the saved run does not read", "a file that edgesd saved on pause", "Draw the picture anew")
        }
    }

    init(_ data: [UInt8]) throws {
        let file = try Safetensors(parsing: data), head = file.metadata
        func wrong() -> Safetensors.Malformed { .init(reason: "arrays that do not belong together") }
        guard data.count <= SavedRun.maxBytes, head["format"] == SavedRun.format, let steps = Int(head["steps"] ?? ""),
            let sampler = head["sampler"], let owner = head["owner"],
            let row = file.tensors["row"]?.i32, row.shape == [2]
        else { throw wrong() }
        func numbered(_ kind: String, _ most: Int) throws -> [Tensor] {
            var found: [Tensor] = []
            while found.count < most, let any = file.tensors["\(kind)_\(found.count)"] {
                guard let array = any.f32, array.shape.count == 4, array.count > 0, array.isFinite else { throw wrong() }
                found.append(array)
            }
            return found
        }
        let inputs = try numbered("input", SamplerTable.maxInputs), outputs = try numbered("output", SamplerTable.maxOutputs)
        let last = try numbered("last", 2)
        guard !inputs.isEmpty, last.count != 1, Set((inputs + outputs + last).map(\.shape)).count == 1,
            file.tensors.count == 1 + inputs.count + outputs.count + last.count
        else { throw wrong() }
        state = RunState(row: Int(row.values[0]), start: Int(row.values[1]), inputs: inputs, outputs: outputs)
        (self.sampler, self.steps, self.owner, told) = (sampler, steps, owner, head["told"] ?? "")
        self.last = last.isEmpty ? nil : (last[0], last[1])
    }

    /// The state, if it is of this table and owner. RequestError when it is another's, DataError when it does not fit.
    public func fitting(_ table: SamplerTable, owner: String = "") throws -> RunState {
        guard steps == table.steps, sampler == table.name else {
            throw requestError("a run of \(steps) steps of \(shown(sampler, limit: 64))",
                               "\(table.steps) steps of \(table.name)", "Resume with the same settings")
        }
        guard self.owner == owner else {
            throw requestError("the saved run of another picture", "the same prompt, seed, settings and model",
                               "Say the same as before, or draw anew")
        }
        // A run that began at `start` has seen this many inputs and outputs by now; with fewer it would go on wrongly.
        let (row, start) = (state.row, state.start)
        guard start >= 0, start <= row, row <= table.rows, start == 0 || table.starts[start] != nil,
            state.inputs.count == min(row - start + 1, table.inputs),
            state.outputs.count == min(row - start, table.outputs - 1)
        else { throw dataError("the saved run does not fit its table", "rows 0 to \(table.rows)", "Draw the picture anew") }
        return state
    }
}
