/// One finished row. sample: the UNet's input; latents: its next one, or the finished latents; state: to resume.
public struct Step: Sendable {
    public let table: SamplerTable
    public let row: Int
    public let sample, modelOutput, latents: Tensor
    public let state: RunState

    public var timestep: Float { table.timestep[row] }

    /// x0 as this row predicts it: the preview, and the picture when a run stops early.
    public var denoised: Tensor {
        let (skip, out) = table.x0Coefficients(row)
        return .mix(skip, sample, out, modelOutput)
    }

    public var isLast: Bool { row == table.rows - 1 }
}

/// The loop (edgesd/runtime/loop.py): a table's rows through a model, one `next` a row.
///
/// Sums are float32, inputs first, then outputs, then noise, newest first, zero coefficients skipped.
public struct Loop {
    public let table: SamplerTable
    public private(set) var state: RunState

    /// Begins at row `start` with latents = the UNet's input there. RequestError for a start without a warm-up.
    public init(_ table: SamplerTable, latents: Tensor, start: Int = 0) throws {
        try self.init(table, RunState(row: start, start: start, inputs: [latents], outputs: []))
    }

    /// Goes on from a state.
    public init(_ table: SamplerTable, _ state: RunState) throws {
        guard state.start == 0 || table.starts[state.start] != nil else {
            let allowed = table.starts.keys.sorted().map(String.init).joined(separator: ", ")
            throw requestError("a start at row \(state.start)", "0 or one of \(allowed)", "Choose one of these")
        }
        (self.table, self.state) = (table, state)
    }

    /// The next row's step, nil after the last. denoise(sample [B,C,h,w], row) -> model output; noise(row) -> normals.
    public mutating func next(denoise: (Tensor, Int) throws -> Tensor, noise: (Int) throws -> Tensor) rethrows -> Step? {
        let row = state.row
        guard row < table.rows else { return nil }
        let sample = state.inputs[0], output = try denoise(sample, row)
        let outputs = [output] + state.outputs
        let coef = table.coefficients(row, start: state.start)
        var total = sample.scaled(coef.input[0])
        func add(_ factor: Float, _ array: Tensor) {
            guard factor != 0 else { return }
            total.values.withUnsafeMutableBufferPointer { sum in
                for i in sum.indices { sum[i] += factor * array.values[i] }
            }
        }
        for (factor, array) in zip(coef.input, state.inputs).dropFirst() { add(factor, array) }
        for (factor, array) in zip(coef.output, outputs) { add(factor, array) }
        if table.draws[row] { add(coef.noise, try noise(row)) }  // drawn even where it is not used
        let latents = total
        state = RunState(
            row: row + 1, start: state.start, inputs: Array(([latents] + state.inputs).prefix(table.inputs)),
            outputs: Array(outputs.prefix(table.outputs - 1)))
        return Step(table: table, row: row, sample: sample, modelOutput: output, latents: latents, state: state)
    }
}
