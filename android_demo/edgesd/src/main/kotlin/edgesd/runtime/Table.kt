/**
 * A sampler as data: the banded recurrence that turns model outputs into the next UNet input, and its file (edgesd/runtime/table.py).
 *
 *     u_0     = init_scale * z_start
 *     u_{i+1} = sum_p input_coef[i,p] u_{i-p} + sum_q output_coef[i,q] e_{i-q} + noise_coef[i] z_i
 */
package edgesd.runtime

import edgesd.Bytes
import edgesd.DataError
import edgesd.Floats
import edgesd.JsonError
import edgesd.Longs
import edgesd.NdArray
import edgesd.RequestError
import edgesd.readJson
import edgesd.readSafetensors
import edgesd.short
import edgesd.shown
import kotlin.math.sqrt

const val MAX_INPUTS = 4
const val MAX_OUTPUTS = 5
const val MAX_STEPS = 1000
const val MAX_TABLE_BYTES = 64L shl 20
const val TABLE_FORMAT = "edgesd-tables-1"
private val PREDICTION_TYPES = setOf("epsilon", "v_prediction", "sample", "flow", "edm")

/** Consecutive rows; index 0 of a row's coefficients is the newest. */
class Rows(val input: List<FloatArray>, val output: List<FloatArray>, val noise: FloatArray)

class Coefficients(val input: FloatArray, val output: FloatArray, val noise: Float)

/** One sampler at one step count. order: rows per step, the stride of possible starts. starts: start row -> its warm-up rows. */
class SamplerTable(
    val name: String, val steps: Int, val predictionType: String, val timestep: FloatArray, val alpha: FloatArray, val sigma: FloatArray,
    private val body: Rows, val draws: BooleanArray, val initScale: Float, val order: Int, val starts: Map<Int, Rows>,
) {
    val rows: Int get() = timestep.size
    val inputs: Int get() = body.input[0].size
    val outputs: Int get() = body.output[0].size

    /** Coefficients of a row in a run that began at row [start]. */
    fun coefficients(row: Int, start: Int = 0): Coefficients {
        val warm = if (start == 0) body else starts.getValue(start)
        val inWarm = row - start < warm.noise.size
        val (rows, at) = if (inWarm) warm to row - start else body to row
        return Coefficients(rows.input[at], rows.output[at], rows.noise[at])
    }

    /** (skip, out) with x0 = skip * u + out * e, the prediction of the clean latents. */
    fun x0Coefficients(row: Int): Pair<Float, Float> {
        val a = alpha[row].toDouble()
        val s = sigma[row].toDouble()
        val (skip, out) = when (predictionType) {
            "epsilon" -> 1 / a to -s / a
            "v_prediction" -> a to -s
            "sample" -> 0.0 to 1.0
            "flow" -> 1 / (a + s) to -s / (a + s)
            else -> (1 - s * s) / a to s * sqrt(1 - s * s) / a // edm: Karras et al. 2022, eq. 7
        }
        return skip.toFloat() to out.toFloat()
    }

    /** The row image-to-image starts at, as diffusers' `get_timesteps`: strength above 0 to 1. */
    fun startRow(strength: Double): Int {
        if (!(strength > 0 && strength <= 1)) throw RequestError("strength ${short(strength)}", "above 0, at most 1", "Choose a strength in that range")
        val done = steps - minOf((steps * strength).toInt(), steps)
        if (done >= steps) {
            throw RequestError("strength ${short(strength)} with $steps steps leaves no step", "at least ${short(1.0 / steps)}", "Raise the strength or the steps")
        }
        return done * order
    }
}

/** The rows a run may start at besides 0. */
fun possibleStarts(rows: Int, steps: Int, order: Int): List<Int> = (order until minOf(rows, steps * order) step order).toList()

/** The tables of a file's bytes: (sampler, steps) -> table, and the step counts of each. Throws DataError for a broken file. */
class TableFile(data: ByteArray) {
    private val packs: Map<String, Pack>

    init {
        packs = try {
            require(data.size <= MAX_TABLE_BYTES) { "more than $MAX_TABLE_BYTES bytes" }
            val file = readSafetensors(data)
            val heads = readJson(requireNotNull(file.metadata[TABLE_FORMAT]) { "no table file" }) as? Map<*, *>
            requireNotNull(heads) { "no table file" }.entries.associate { (name, head) ->
                name as String to Pack(name, head as? Map<*, *> ?: throw IllegalArgumentException("a head that is no object"), file.arrays)
            }
        } catch (error: JsonError) {
            throw broken(error)
        } catch (error: IllegalArgumentException) {
            throw broken(error)
        } catch (error: ArithmeticException) {
            throw broken(error)
        }
    }

    private fun broken(error: Exception) =
        DataError("the sampler tables do not read (${shown(error.message, 120)})", "what edgesd wrote", "Package the model again")

    fun steps(sampler: String): List<Int> = packs[sampler]?.counts ?: throw none(sampler, packs.keys.joinToString())

    fun table(sampler: String, steps: Int): SamplerTable {
        val pack = packs[sampler] ?: throw none(sampler, packs.keys.joinToString())
        return pack.table(steps) ?: throw none("$steps steps of $sampler", pack.counts.joinToString())
    }

    private fun none(what: String, have: String) = RequestError("a table for ${shown(what, 80)}", have, "Choose one of these")
}

/** One sampler's arrays, its step counts end to end; checked whole on construction (IllegalArgumentException says what is wrong). */
private class Pack(private val name: String, head: Map<*, *>, arrays: Map<String, NdArray>) {
    private val predictionType = head["prediction_type"]
    private val order = whole(head["order"], 1..4, "order")
    private val p = whole(head["inputs"], 1..MAX_INPUTS, "past inputs")
    private val q = whole(head["outputs"], 1..MAX_OUTPUTS, "past outputs")
    private val floats = listOf("init_scale", "timestep", "alpha", "sigma", "noise_coef", "input_coef", "output_coef", "warm_coef")
        .associateWith { key -> arrays["$name/$key"] as? Floats ?: wrong("$key is missing or of another type") }
    val counts = ints(arrays, "steps")
    private val rowCounts = ints(arrays, "rows")
    private val draws = (arrays["$name/draws"] as? Bytes ?: wrong("draws")).data
    private val warmRows = (arrays["$name/warm_rows"] as? Bytes ?: wrong("warm_rows")).data.map { it.toInt() and 255 }
    private val rowAt: List<Int>
    private val startAt: List<Int>
    private val coefAt: List<Int>

    init {
        check(predictionType in PREDICTION_TYPES, "prediction type")
        check(floats.values.all { it.finite() }, "numbers that are not finite")
        check(counts.size in 1..MAX_STEPS && rowCounts.size == counts.size, "steps and rows")
        check(counts.first() >= 1 && counts.last() <= MAX_STEPS && counts.zipWithNext().all { (a, b) -> a < b }, "step counts must rise")
        check(rowCounts.all { it in 1..8 * MAX_STEPS }, "row counts")
        val total = rowCounts.sum()
        check(shape("init_scale") == listOf(counts.size), "init_scale")
        check(listOf("timestep", "alpha", "sigma", "noise_coef").all { shape(it) == listOf(total) } && draws.size == total, "an array's length")
        check(shape("input_coef") == listOf(total, p) && shape("output_coef") == listOf(total, q), "a band's shape")
        check(draws.all { it in 0..1 } && values("alpha").all { it >= 0 } && values("sigma").all { it >= 0 }, "a sign")
        check((0 until total).all { values("alpha")[it] + values("sigma")[it] > 0 }, "a row without signal and noise")
        check(predictionType != "epsilon" || values("alpha").all { it > 0 }, "alpha 0 with epsilon prediction")
        val starts = counts.indices.map { possibleStarts(rowCounts[it], counts[it], order) }
        check(warmRows.size == starts.sumOf { it.size }, "the number of starts")
        val packed = warmRows.map { count -> (0 until count).sumOf { minOf(it + 1, p) + minOf(it + 1, q) + 1 } }
        check(shape("warm_coef") == listOf(packed.sum()), "the number of warm-up coefficients")
        rowAt = rowCounts.runningFold(0, Int::plus)
        startAt = starts.runningFold(0) { at, list -> at + list.size }
        coefAt = packed.runningFold(0, Int::plus)
        val room = starts.flatMapIndexed { i, list -> list.map { rowCounts[i] - it } }
        check(warmRows.indices.all { warmRows[it] <= room[it] }, "a warm-up longer than its run")
    }

    private fun wrong(what: String): Nothing = throw IllegalArgumentException("${shown(name, 64)}: $what")

    private fun check(good: Boolean, what: String) {
        if (!good) wrong(what)
    }

    private fun whole(value: Any?, range: IntRange, what: String) = (value as? Long)?.takeIf { it in range.first..range.last }?.toInt() ?: wrong(what)

    private fun ints(arrays: Map<String, NdArray>, key: String): List<Int> {
        val found = arrays["$name/$key"] as? Longs ?: wrong(key)
        check(found.shape.size == 1, key)
        return found.data.map { it.toInt() }
    }

    private fun shape(key: String) = floats.getValue(key).shape

    private fun values(key: String) = floats.getValue(key).data

    fun table(steps: Int): SamplerTable? {
        val at = counts.indexOf(steps)
        if (at < 0) return null
        val from = rowAt[at]
        val to = rowAt[at + 1]
        // A short run has a shorter memory than its sampler's widest band: columns it never uses are left off again.
        val input = band("input_coef", from, to, p)
        val output = band("output_coef", from, to, q)
        val wideIn = used(input)
        val wideOut = used(output)
        fun cut(rows: List<FloatArray>, width: Int) = rows.map { it.copyOf(width) }
        val starts = possibleStarts(rowCounts[at], steps, order).mapIndexed { i, start ->
            val warm = unpack(startAt[at] + i)
            start to Rows(cut(warm.input, wideIn), cut(warm.output, wideOut), warm.noise)
        }.toMap()
        fun part(key: String) = values(key).copyOfRange(from, to)
        return SamplerTable(
            name, steps, predictionType as String, part("timestep"), part("alpha"), part("sigma"),
            Rows(cut(input, wideIn), cut(output, wideOut), part("noise_coef")), BooleanArray(to - from) { draws[from + it].toInt() == 1 },
            values("init_scale")[at], order, starts,
        )
    }

    private fun band(key: String, from: Int, to: Int, width: Int) = (from until to).map { values(key).copyOfRange(it * width, (it + 1) * width) }

    private fun used(rows: List<FloatArray>) = maxOf(1, rows.maxOf { row -> row.indexOfLast { it != 0f } + 1 })

    private fun unpack(number: Int): Rows {
        var at = coefAt[number]
        val input = ArrayList<FloatArray>()
        val output = ArrayList<FloatArray>()
        val noise = FloatArray(warmRows[number])
        for (k in noise.indices) {
            val i = minOf(k + 1, p)
            val o = minOf(k + 1, q)
            input.add(values("warm_coef").copyOfRange(at, at + i).copyOf(p))
            output.add(values("warm_coef").copyOfRange(at + i, at + i + o).copyOf(q))
            noise[k] = values("warm_coef")[at + i + o]
            at += i + o + 1
        }
        return Rows(input, output, noise)
    }
}
