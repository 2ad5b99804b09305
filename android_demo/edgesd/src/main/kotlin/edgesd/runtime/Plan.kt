/** What varies by row besides the sampler: guidance, width, the unconditional call, and when a run may end early (edgesd/runtime/plan.py). */
package edgesd.runtime

import edgesd.Floats
import edgesd.RequestError
import edgesd.short
import kotlin.math.PI
import kotlin.math.cos
import kotlin.math.floor
import kotlin.math.sqrt

const val MAX_PLAN_GUIDANCE = 1000.0

/** Per row: guidance (1 = none), width, uncond (is the unconditional call made). rescale: guidance_rescale; earlyStop: see [settled]. */
class RunPlan(
    val guidance: DoubleArray, val width: DoubleArray, val uncond: BooleanArray, val rescale: Double = 0.0, val earlyStop: Double? = null,
) {
    init {
        if (guidance.isEmpty() || width.size != guidance.size || uncond.size != guidance.size) {
            throw refused("a plan whose lists differ in length", "one guidance, width and uncond per row")
        }
        if (!guidance.all { it in 0.0..MAX_PLAN_GUIDANCE }) throw refused("guidance ${guidance.toList()}", "0 to ${short(MAX_PLAN_GUIDANCE)}")
        if (!width.all { it > 0 && it <= 1 }) throw refused("width ${width.toList()}", "above 0, at most 1")
        if (guidance.indices.any { guidance[it] != 1.0 && !uncond[it] }) {
            throw refused("guidance without the unconditional call", "guidance 1 where it is skipped")
        }
        if (rescale !in 0.0..1.0) throw refused("guidance_rescale $rescale", "0 to 1")
        if (earlyStop != null && !(earlyStop > 0 && earlyStop < 1)) throw refused("early_stop $earlyStop", "above 0, below 1")
    }

    /** UNet calls per picture from row [start] on: one each, two where the unconditional call is made. */
    fun calls(start: Int = 0): Int = guidance.size - start + (start until uncond.size).count { uncond[it] }

    /** Whether x0 moved by less than earlyStop of its own size (rms) since the row before. */
    fun settled(before: Floats, x0: Floats): Boolean {
        if (earlyStop == null) return false
        var moved = 0.0
        var size = 0.0
        for (i in x0.data.indices) {
            val d = (x0.data[i] - before.data[i]).toDouble()
            moved += d * d
            size += x0.data[i].toDouble() * x0.data[i]
        }
        return sqrt(moved / x0.data.size) < earlyStop * sqrt(size / x0.data.size)
    }
}

private fun refused(came: String, allowed: String) = RequestError(came, allowed, "Change the guidance settings")

/** Guidance by x = row / (rows - 1): 0 at pure noise, 1 at the last row. */
val SCHEDULES: Map<String, (Double, Double) -> Double> = linkedMapOf(
    "constant" to { _, g -> g },
    "linear" to { x, g -> 1 + 2 * x * (g - 1) }, // the mean stays (Wang et al. 2024)
    "cosine" to { x, g -> 1 + (1 - cos(PI * x)) * (g - 1) },
    "interval" to { x, g -> if (x in 0.2..0.8) g else 1.0 }, // Kynkaanniemi et al. 2024
    "three_stage" to { x, g -> 1 + (g - 1) * minOf(maxOf(1.0 / 3 + (x - 0.2) / 0.4 * 2 / 3, 1.0 / 3), 1.0) },
)

/** until: share of the rows with guidance. switch: (share of the rows, width) from where on that width. */
fun makePlan(
    kind: String, rows: Int, guidance: Double, until: Double = 1.0, rescale: Double = 0.0, width: Double = 1.0,
    switch: Pair<Double, Double>? = null, earlyStop: Double? = null,
): RunPlan {
    val schedule = SCHEDULES[kind] ?: throw RequestError("guidance schedule '$kind'", SCHEDULES.keys.joinToString(), "Choose one of these")
    if (rows < 1 || until !in 0.0..1.0) throw refused("guidance until $until of $rows rows", "0 to 1, of at least one row")
    if (guidance !in 0.0..MAX_PLAN_GUIDANCE) throw refused("guidance $guidance", "0 to ${short(MAX_PLAN_GUIDANCE)}")
    val scale = DoubleArray(rows) { row ->
        val wanted = if (row < until * rows) schedule(row.toDouble() / maxOf(rows - 1, 1), guidance) else 1.0
        wanted.toFloat().toDouble().coerceIn(0.0, MAX_PLAN_GUIDANCE)
    }
    val first = if (switch == null) rows else switchRow(rows, switch.first)
    val widths = DoubleArray(rows) { if (it < first || switch == null) width else switch.second }
    return RunPlan(scale, widths, BooleanArray(rows) { scale[it] != 1.0 }, rescale, earlyStop)
}

/** The first row that has the second width of a switch after [share] of the run. */
fun switchRow(rows: Int, share: Double): Int = floor(share * rows + 0.5).toInt().coerceIn(0, rows)

/** Classifier-free guidance on model outputs, as diffusers; rescale: Lin et al. 2023, eqs. 15-16. One picture (batch 1). */
fun combine(uncond: Floats, cond: Floats, guidance: Double, rescale: Double = 0.0): Floats {
    val scale = guidance.toFloat()
    val guided = uncond.with(cond) { u, c -> u + scale * (c - u) }
    if (rescale == 0.0) return guided
    val ratio = (deviation(cond) / deviation(guided)).toFloat()
    val r = rescale.toFloat()
    val rest = (1 - rescale).toFloat()
    return guided.map { r * (it * ratio) + rest * it }
}

private fun deviation(x: Floats): Double {
    val mean = x.data.sumOf { it.toDouble() } / x.data.size
    return sqrt(x.data.sumOf { (it - mean) * (it - mean) } / (x.data.size - 1))
}
