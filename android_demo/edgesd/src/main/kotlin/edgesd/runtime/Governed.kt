/** A picture under a policy: asked before every step, it may shorten the run, end guidance, narrow once, or wait (edgesd/runtime/governed.py). */
package edgesd.runtime

import edgesd.DataError
import edgesd.short

private val KINDS = setOf("shorten", "unguide", "narrow", "pause")
private const val LEARNING = 0.3 // weight of the newest call in the running mean of seconds per call

/** What a policy changed before the step that follows [rowsRun] finished rows; kind names the first thing of it. */
data class Change(
    val rowsRun: Int, val kind: String, val steps: Int, val width: Double, val guidanceUntil: Double, val seconds: Double, val reason: String,
) {
    fun toJson(): Map<String, Any?> = linkedMapOf(
        "rows_run" to rowsRun, "kind" to kind, "steps" to steps, "width" to width, "guidance_until" to guidanceUntil, "seconds" to seconds,
        "reason" to reason,
    )

    fun describe(): String = when (kind) {
        "shorten" -> "shortened to $steps steps"
        "narrow" -> "narrowed to width ${short(width)}"
        "unguide" -> "guidance ends at ${short(guidanceUntil * 100)}% of the run"
        else -> "waited ${short(seconds)} s"
    } + " after row $rowsRun: $reason"

    companion object {
        /** A change as a picture carries it; DataError for anything else. */
        fun fromJson(data: Any?): Change {
            val map = data as? Map<*, *>
            fun number(key: String) = (map?.get(key) as? Number)?.toDouble()?.takeIf { it.isFinite() }
            val rows = map?.get("rows_run") as? Long
            val steps = map?.get("steps") as? Long
            val width = number("width")
            val until = number("guidance_until")
            val seconds = number("seconds")
            val kind = map?.get("kind") as? String
            val reason = map?.get("reason") as? String
            if (map?.size != 7 || rows == null || rows !in 0..65536 || steps == null || steps !in 1..1000 || width == null || !(width > 0 && width <= 1) ||
                until == null || until !in 0.0..1.0 || seconds == null || seconds < 0 || kind !in KINDS || kind == null || reason == null || reason.length > 400
            ) throw DataError("the picture's log of changes does not parse", "what edgesd writes", "Draw it anew")
            return Change(rows.toInt(), kind, steps.toInt(), width, until, seconds, reason)
        }
    }
}

/** What changes before the step that follows [rowsRun] rows and [calls] UNet rows; a pause is already over. */
fun interface Governor {
    fun ask(rowsRun: Int, calls: Int): List<Change>
}

/** The recorded changes again, each at its row. Pauses are told and not waited. */
class Replay(private val changes: List<Change>) : Governor {
    override fun ask(rowsRun: Int, calls: Int) = changes.filter { it.rowsRun == rowsRun }
}

/**
 * A policy in charge of pictures drawn one after another, on sensors that [sense] reads.
 *
 * [begin] decides a picture, [ask] is called before each of its later steps. Within a picture steps, width and guidance only fall, and width once
 * at most; hysteresis spans pictures. clock and sleep: seconds. share: what a call at a width costs of one at 1.
 */
class PolicyRun(
    val policy: Policy, private val sense: () -> DeviceState, val limits: Limits, deadlineS: Double? = null, private val clock: () -> Double,
    private val sleep: (Double) -> Unit, private val share: (Double) -> Double = ::widthCost,
) : Governor {
    private var known = DeviceState(deadlineS = deadlineS)
    private var now: Decision? = null
    private var given: Outcome? = null
    private var level = 0
    private var waited = emptyList<Change>()
    private var mark: Pair<Double, Int>? = null
    private var narrowed = false

    /** What the next picture gets, after the rest that the table asks for. Tell the picture's settings so. */
    fun begin(): Decision {
        var decision = decideNow()
        waited = emptyList()
        mark = null
        narrowed = false
        if (decision.given.coolDownS > 0) {
            waited = listOf(pause(0, decision.given, decision))
            decision = decideNow()
        }
        given = decision.given
        level = decision.level
        return decision
    }

    override fun ask(rowsRun: Int, calls: Int): List<Change> {
        val before = given
        if (rowsRun == 0 || before == null) return waited
        learn(calls, before)
        val wanted = decideNow()
        val entered = wanted.level > level
        val made = fall(before, wanted, rowsRun).toMutableList()
        if (entered && wanted.given.coolDownS > 0) made.add(pause(rowsRun, before, wanted))
        mark = clock() to calls
        return made
    }

    private fun fall(before: Outcome, wanted: Decision, rowsRun: Int): List<Change> {
        val width = if (narrowed) before.width else minOf(before.width, wanted.given.width)
        val after = before.copy(
            steps = minOf(before.steps, wanted.given.steps), width = width, guidanceUntil = minOf(before.guidanceUntil, wanted.given.guidanceUntil),
        )
        level = maxOf(level, wanted.level)
        given = after
        narrowed = narrowed || after.width < before.width
        val fell = listOf(
            "narrow" to (after.width < before.width), "shorten" to (after.steps < before.steps),
            "unguide" to (after.guidanceUntil < before.guidanceUntil && after.steps == before.steps),
        )
        return fell.filter { it.second }.map { Change(rowsRun, it.first, after.steps, after.width, after.guidanceUntil, 0.0, wanted.reason) }
    }

    private fun decideNow(): Decision = decide(policy, merge(known, sense()), now?.asPrevious(), limits).also { now = it }

    private fun pause(rowsRun: Int, inForce: Outcome, why: Decision): Change {
        sleep(why.given.coolDownS)
        return Change(rowsRun, "pause", inForce.steps, inForce.width, inForce.guidanceUntil, why.given.coolDownS, why.reason)
    }

    /** Running mean of seconds per call. The first row's time is not learned: it holds the loading of the model. */
    private fun learn(calls: Int, before: Outcome) {
        val (then, done) = mark ?: return
        if (calls <= done) return
        val seconds = (clock() - then) / (calls - done)
        if (seconds <= 0) return
        val whole = seconds / share(before.width)
        val mean = known.secondsPerCall[1.0] ?: whole
        known = known.copy(secondsPerCall = mapOf(1.0 to mean + LEARNING * (whole - mean)))
    }
}
