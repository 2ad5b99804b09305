/** The loop: a table's rows through a model (edgesd/runtime/loop.py). Sums are float32: inputs, outputs, noise, newest first, zeros skipped. */
package edgesd.runtime

import edgesd.Floats
import edgesd.RequestError

/** One finished row. sample: the UNet's input; latents: its next one, or the finished latents; state: to resume. */
class Step(val table: SamplerTable, val row: Int, val sample: Floats, val modelOutput: Floats, val latents: Floats, val state: State) {
    val timestep: Float get() = table.timestep[row]
    val last: Boolean get() = row == table.rows - 1

    /** x0 as this row predicts it: the preview, and the picture when a run stops early. */
    val denoised: Floats get() = predictX0(table, row, sample, modelOutput)
}

/**
 * A Step per row, from [start] with latents = the UNet's input there, or from [state] (both then ignored).
 *
 * adjust(latents, row) may replace what the coming row gets (inpainting; row == table.rows: the result).
 */
fun run(
    table: SamplerTable, denoise: (Floats, Int) -> Floats, latents: Floats, noise: (Int) -> Floats, start: Int = 0, state: State? = null,
    adjust: ((Floats, Int) -> Floats)? = null,
): Sequence<Step> = sequence {
    val from = state ?: State(start, start, listOf(latents))
    if (from.start != 0 && from.start !in table.starts) {
        throw RequestError("a start at row ${from.start}", "0 or one of ${table.starts.keys}", "Choose one of these")
    }
    val inputs = ArrayList(from.inputs)
    val outputs = ArrayList(from.outputs)
    for (row in from.row until table.rows) {
        outputs.add(0, denoise(inputs[0], row))
        val coef = table.coefficients(row, from.start)
        val drawn = if (table.draws[row]) noise(row) else null // drawn even where it is not used: the order of draws is part of the result
        val total = FloatArray(inputs[0].data.size) { coef.input[0] * inputs[0].data[it] }
        fun add(factor: Float, array: Floats) {
            if (factor != 0f) for (i in total.indices) total[i] += factor * array.data[i]
        }
        for (i in 1 until minOf(coef.input.size, inputs.size)) add(coef.input[i], inputs[i])
        for (i in 0 until minOf(coef.output.size, outputs.size)) add(coef.output[i], outputs[i])
        if (drawn != null) add(coef.noise, drawn)
        val sample = inputs[0]
        val modelOutput = outputs[0]
        val next = Floats(sample.shape, total)
        inputs.add(0, if (adjust == null) next else adjust(next, row + 1))
        while (inputs.size > table.inputs) inputs.removeAt(inputs.size - 1)
        while (outputs.size > table.outputs - 1) outputs.removeAt(outputs.size - 1)
        yield(Step(table, row, sample, modelOutput, inputs[0], State(row + 1, from.start, inputs.toList(), outputs.toList())))
    }
}
