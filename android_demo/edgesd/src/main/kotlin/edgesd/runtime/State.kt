/** Where a run begins: noise, a picture, another table's run (the bridge), or a file (pause and resume). edgesd/runtime/state.py. */
package edgesd.runtime

import edgesd.DataError
import edgesd.Floats
import edgesd.Longs
import edgesd.NdArray
import edgesd.RequestError
import edgesd.readSafetensors
import edgesd.shown
import edgesd.writeSafetensors
import edgesd.writeWhole
import java.io.IOException
import java.nio.file.Files
import java.nio.file.Path

const val STATE_FORMAT = "edgesd-state-1"
private const val MAX_STATE_BYTES = 1L shl 30

/** All that a run needs to go on at [row]: inputs (u_row first) and outputs (e_{row-1} first). start: the row the run began at. */
class State(val row: Int, val start: Int, val inputs: List<Floats>, val outputs: List<Floats> = emptyList())

/** The UNet's input at row 0 from standard normals. */
fun initLatents(table: SamplerTable, noise: Floats): Floats = noise.map { table.initScale * it }

/** x0 at the noise of a row, as the UNet's input there; at row == table.rows, after the last, x0 itself. */
fun addNoise(table: SamplerTable, row: Int, x0: Floats, noise: Floats): Floats =
    if (row == table.rows) x0 else x0.with(noise) { x, z -> table.alpha[row] * x + table.sigma[row] * z }

fun predictX0(table: SamplerTable, row: Int, sample: Floats, modelOutput: Floats): Floats {
    val (skip, out) = table.x0Coefficients(row)
    return sample.with(modelOutput) { u, e -> skip * u + out * e }
}

/**
 * Leaves [table] after the UNet's call at [row] and enters [other] at its nearest lower noise level: x0 and eps of that call mixed anew there
 * (a DDIM step). Where no row of [other] lies lower, the State is its end and holds x0.
 */
fun bridge(table: SamplerTable, row: Int, sample: Floats, modelOutput: Floats, other: SamplerTable): State {
    val x0 = predictX0(table, row, sample, modelOutput)
    val level = table.sigma[row].toDouble() / maxOf(table.alpha[row].toDouble(), 1e-30)
    for (entry in listOf(0) + other.starts.keys.sorted()) {
        if (other.sigma[entry].toDouble() < level * (1 - 1e-6) * other.alpha[entry].toDouble()) {
            val eps = sample.with(x0) { u, x -> (u - table.alpha[row] * x) / table.sigma[row] }
            return State(entry, entry, listOf(addNoise(other, entry, x0, eps)))
        }
    }
    return State(other.rows, 0, listOf(x0))
}

/** What a file holds: a state, the table it is of, whose it is. told: text kept with it; last: input and output of the last row. */
class Saved(val state: State, val sampler: String, val steps: Int, val owner: String, val told: String, val last: Pair<Floats, Floats>?)

/** Writes a run's state, so that it appears whole or not at all. owner: whose run it is. */
fun saveState(path: Path, table: SamplerTable, state: State, owner: String = "", told: String = "", last: Pair<Floats, Floats>? = null) {
    val arrays = LinkedHashMap<String, NdArray>()
    state.inputs.forEachIndexed { i, array -> arrays["input_$i"] = array }
    state.outputs.forEachIndexed { i, array -> arrays["output_$i"] = array }
    last?.toList()?.forEachIndexed { i, array -> arrays["last_$i"] = array }
    arrays["row"] = Longs(listOf(2), longArrayOf(state.row.toLong(), state.start.toLong()))
    val head = mapOf("format" to STATE_FORMAT, "sampler" to table.name, "steps" to table.steps.toString(), "owner" to owner, "told" to told)
    writeWhole(path, writeSafetensors(arrays, head, int32 = setOf("row")))
}

/** Reads what [saveState] wrote, here or in Python. Throws DataError when it is broken. */
fun readState(path: Path): Saved {
    try {
        require(Files.size(path) <= MAX_STATE_BYTES) { "too large" }
        val file = readSafetensors(Files.readAllBytes(path))
        val head = file.metadata
        require(head["format"] == STATE_FORMAT) { "no state file" }
        val arrays = LinkedHashMap(file.arrays)
        val rows = (arrays.remove("row") as? Longs)?.data
        require(rows != null && rows.size == 2 && rows.all { it in 0..8L * MAX_STEPS }) { "rows" }
        fun numbered(kind: String, most: Int): List<Floats> = (0 until most).map { arrays.remove("${kind}_$it") }.takeWhile { it != null }.map {
            require(it is Floats && it.shape.size == 4 && it.count > 0 && it.finite()) { "$kind that is no finite float32 [B,C,h,w]" }
            it
        }
        val inputs = numbered("input", MAX_INPUTS)
        val outputs = numbered("output", MAX_OUTPUTS)
        val last = numbered("last", 2)
        val alike = (inputs + outputs + last).map { it.shape }.toSet().size == 1
        require(arrays.isEmpty() && inputs.isNotEmpty() && last.size != 1 && alike) { "arrays that do not belong together" }
        val steps = head["steps"]?.toIntOrNull()
        require(steps != null && "sampler" in head && "owner" in head) { "a head that lacks something" }
        val ends = if (last.isEmpty()) null else last[0] to last[1]
        val state = State(rows[0].toInt(), rows[1].toInt(), inputs, outputs)
        return Saved(state, head.getValue("sampler").take(64), steps, head.getValue("owner"), head["told"] ?: "", ends)
    } catch (error: IllegalArgumentException) {
        throw broken(error)
    } catch (error: ArithmeticException) {
        throw broken(error)
    } catch (error: IOException) {
        throw broken(error)
    }
}

private fun broken(error: Exception) =
    DataError("the saved run does not read (${shown(error.message, 120)})", "a file that edgesd saved on pause", "Draw the picture anew")

/** The state, if it is of this table and owner. Throws RequestError for another's, DataError where it does not fit the table. */
fun fitting(saved: Saved, table: SamplerTable, owner: String = ""): State {
    val state = saved.state
    val whose = "${saved.steps} steps of ${saved.sampler}"
    if (whose != "${table.steps} steps of ${table.name}") {
        throw RequestError("a run of ${shown(whose, 80)}", "${table.steps} steps of ${table.name}", "Resume with the same settings")
    }
    if (saved.owner != owner) {
        throw RequestError("the saved run of another picture", "the same prompt, seed, settings and model", "Draw the picture anew")
    }
    // A run that began at `start` has seen this many inputs and outputs by now; with fewer it would go on wrongly.
    val seen = state.row - state.start
    val fits = state.inputs.size == minOf(seen + 1, table.inputs) && state.outputs.size == minOf(seen, table.outputs - 1)
    val allowed = state.start in 0..state.row && state.row <= table.rows && (state.start == 0 || state.start in table.starts)
    if (!allowed || !fits) throw DataError("the saved run does not fit its table", "rows 0 to ${table.rows}", "Draw the picture anew")
    return state
}
