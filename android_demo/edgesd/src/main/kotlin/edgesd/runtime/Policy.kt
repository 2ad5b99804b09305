/** A policy is a table: what the device feels like -> how much work a picture gets. The algorithm, step by step: docs/policies.md. */
package edgesd.runtime

import edgesd.DataError
import edgesd.Fields
import edgesd.JsonError
import edgesd.MAX_INT
import edgesd.RequestError
import edgesd.Wrong
import edgesd.readJson
import edgesd.short
import edgesd.shown

const val POLICY_FORMAT = "edgesd-policy-1"
const val MAX_POLICY_BYTES = 1L shl 18
val UNBOUNDED = MAX_INT.toDouble()
private const val INNER_SHARE = 0.86 // share of an SD 1.5 UNet's MACs that inner width 0 would take off
private val WORD = Regex("[a-z0-9][a-z0-9_-]{0,39}")

/** What an axis counts as where the device does not tell; charging has its own rule. In the order in which they are told. */
val NOMINAL: Map<String, Any> = linkedMapOf(
    "thermal" to "nominal", "charging" to true, "saver" to false, "headroom" to 0.0, "battery" to 1.0, "free_memory_bytes" to UNBOUNDED,
    "deadline_s" to UNBOUNDED, "seconds_per_call" to 0.0, "affordable_calls" to UNBOUNDED,
)
val SETS = setOf("thermal", "charging", "saver")

/** Closed; high null = no upper end. */
data class Interval(val low: Double, val high: Double?)

/** Conditions that must all hold: axis -> Set<Any> or Interval. */
class When(val conditions: Map<String, Any>) {
    fun holds(values: Map<String, Any>): Boolean = conditions.all { (axis, allowed) ->
        val value = values.getValue(axis)
        if (allowed is Interval) (value as Double) >= allowed.low && (allowed.high == null || value <= allowed.high) else value in allowed as Set<*>
    }
}

data class Outcome(
    val steps: Int, val width: Double = 1.0, val guidanceUntil: Double = 1.0, val tile: Boolean = false, val upscaler: Boolean = false,
    val refiner: Boolean = false, val coolDownS: Double = 0.0,
)

class PolicyRow(val name: String, val level: Int, val whenever: When, val then: Outcome, val reason: String)

/** The first row whose conditions hold is the answer. dwellS: how long it must be better before it counts. */
class Policy(val name: String, val about: String, val dwellS: Double, val rows: List<PolicyRow>) {
    fun axes(): List<String> = NOMINAL.keys.filter { axis -> rows.any { axis in it.whenever.conditions } }

    fun match(values: Map<String, Any>): PolicyRow? = rows.firstOrNull { it.whenever.holds(values) }
}

/** What the user allows and the bundle offers; steps and widths ascending. */
data class Limits(
    val steps: List<Int> = (1..1000).toList(), val widths: List<Double> = listOf(1.0), val minSteps: Int = 1, val maxSteps: Int = 1000,
    val minWidth: Double = 0.0, val maxWidth: Double = 1.0, val minGuidanceUntil: Double = 0.0, val maxGuidanceUntil: Double = 1.0,
    val tile: Boolean = false, val upscaler: Boolean = false, val refiner: Boolean = false,
) {
    init {
        fun check(name: String, low: Double, high: Double, offered: List<Double>?) {
            if (low <= high && (offered == null || offered.any { it in low..high })) return
            val allowed = offered?.take(20)?.joinToString { short(it) } ?: "0, 1"
            throw RequestError("$name from ${short(low)} to ${short(high)}", "a range that holds one of $allowed", "Widen the floor or the ceiling")
        }
        check("steps", minSteps.toDouble(), maxSteps.toDouble(), steps.map { it.toDouble() })
        check("width", minWidth, maxWidth, widths)
        check("guidance until", minGuidanceUntil, maxGuidanceUntil, null)
    }
}

/** What a picture gets and why. capped: what limits did not give. assumed: axes that the device did not tell. */
data class Decision(
    val given: Outcome, val reason: String, val row: String, val level: Int, val timeS: Double, val capped: List<String>,
    val assumed: List<String>, val betterSinceS: Double?,
)

/** (value by axis, the axes that are not known and count as nominal). */
fun point(state: DeviceState): Pair<Map<String, Any>, List<String>> {
    val seconds = state.secondsPerCall[1.0]
    val deadline = state.deadlineS
    val calls = if (deadline != null && seconds != null) minOf(deadline / seconds, UNBOUNDED) else null
    val known = mapOf(
        "thermal" to state.thermal.takeIf { it != "unknown" }, "charging" to state.charging, "saver" to state.saver, "headroom" to state.headroom,
        "battery" to state.battery, "free_memory_bytes" to state.freeMemoryBytes, "deadline_s" to deadline, "seconds_per_call" to seconds,
        "affordable_calls" to calls,
    )
    // A battery that is known but not said to be charging is taken to run down; no battery at all means the mains.
    val nominal = NOMINAL + ("charging" to (state.battery == null))
    return NOMINAL.keys.associateWith { known[it] ?: nominal.getValue(it) } to NOMINAL.keys.filter { known[it] == null }
}

/** What step 3 of docs/policies.md reads of the decision before. */
data class Previous(val row: String, val timeS: Double, val betterSinceS: Double?)

fun Decision.asPrevious() = Previous(row, timeS, betterSinceS)

/** The row in force, capped by the limits. Worse counts at once, better only after dwellS without a break. Pure. */
fun decide(policy: Policy, state: DeviceState, previous: Previous? = null, limits: Limits = Limits()): Decision {
    val (values, unknown) = point(state)
    var row = policy.match(values) ?: throw DataError("policy ${policy.name} says nothing here", "a table without gaps", "Check it at load")
    var since: Double? = null
    val kept = policy.rows.firstOrNull { it.name == previous?.row }
    if (kept != null && previous != null && row.level < kept.level) {
        since = if (previous.betterSinceS == null) state.timeS else minOf(previous.betterSinceS, state.timeS)
        if (state.timeS < previous.timeS) since = state.timeS // the clock began anew
        if (state.timeS - since >= policy.dwellS) since = null else row = kept
    }
    val (given, capped) = cap(row.then, limits)
    return Decision(given, row.reason, row.name, row.level, state.timeS, capped, policy.axes().filter { it in unknown }, since)
}

private fun cap(then: Outcome, limits: Limits): Pair<Outcome, List<String>> {
    val steps = limits.steps.filter { it in limits.minSteps..limits.maxSteps }
    val widths = limits.widths.filter { it in limits.minWidth..limits.maxWidth }
    val given = then.copy(
        steps = steps.filter { it <= then.steps }.maxOrNull() ?: steps.min(), width = widths.filter { it <= then.width }.maxOrNull() ?: widths.min(),
        guidanceUntil = maxOf(limits.minGuidanceUntil, minOf(limits.maxGuidanceUntil, then.guidanceUntil)),
        tile = then.tile && limits.tile, upscaler = then.upscaler && limits.upscaler, refiner = then.refiner && limits.refiner,
    )
    val capped = listOf(
        "steps" to (given.steps != then.steps), "width" to (given.width != then.width), "guidance_until" to (given.guidanceUntil != then.guidanceUntil),
        "tile" to (given.tile != then.tile), "upscaler" to (given.upscaler != then.upscaler), "refiner" to (given.refiner != then.refiner),
    )
    return given to capped.filter { it.second }.map { it.first }
}

/** MACs of a UNet call at a width over those at 1, for SD 1.5's shape. */
fun widthCost(width: Double): Double = 1 - INNER_SHARE * (1 - width)

/** UNet work of a picture in calls at full width. */
fun cost(then: Outcome): Double = then.steps * (1 + then.guidanceUntil) * widthCost(then.width)

/** A checked policy from the bytes of its JSON. DataError for what does not parse, has unknown fields, gaps, or gets dearer. */
fun parsePolicy(data: ByteArray): Policy {
    val fix = "Correct the table as docs/policies.md describes"
    if (data.size > MAX_POLICY_BYTES) throw DataError("a policy of more than $MAX_POLICY_BYTES bytes", "up to $MAX_POLICY_BYTES", fix)
    val policy = try {
        policy(readJson(data) as? Map<*, *> ?: throw Wrong("no object"))
    } catch (error: JsonError) {
        throw DataError("a policy that is no JSON (${shown(error.message)})", "a table of format $POLICY_FORMAT", fix)
    } catch (error: Wrong) {
        throw DataError("policy: ${shown(error.message)}", "a table of format $POLICY_FORMAT", fix)
    }
    check(policy)
    return policy
}

private fun only(raw: Map<*, *>, where: String, vararg allowed: String) {
    // Unknown fields are refused, unlike in a manifest: a condition that is not understood must not count as true.
    val unknown = raw.keys.firstOrNull { it !in allowed }
    if (unknown != null) throw Wrong("$where: ${shown(unknown, 40)} is not known")
}

private fun policy(raw: Map<*, *>): Policy {
    only(raw, "policy", "format", "name", "about", "dwell_s", "rows")
    val f = Fields(raw, "")
    f.oneOf("format", setOf(POLICY_FORMAT), POLICY_FORMAT)
    return Policy(f.text("name", pattern = WORD), sentence(f, "about"), range(f, "dwell_s", 0.0, 3600.0, 30.0), f.each("rows", 1, 64, ::row).also { rows ->
        (raw["rows"] as List<*>).forEach { only(it as Map<*, *>, "row", "name", "level", "when", "then", "reason") }
        f.check(rows.isNotEmpty()) { "no rows" }
    })
}

private fun sentence(f: Fields, key: String) = f.text(key, max = 400).also { f.check(it.isNotEmpty()) { "$key: must not be empty" } }

private fun range(f: Fields, key: String, low: Double, high: Double, default: Double): Double =
    f.number(key, default).also { f.check(it in low..high) { "$key: must be from ${short(low)} to ${short(high)}" } }

private fun row(f: Fields): PolicyRow {
    val then = f.fields("then")
    only(f.map("then"), "then", "steps", "width", "guidance_until", "tile", "upscaler", "refiner", "cool_down_s")
    val width = range(then, "width", 0.0, 1.0, 1.0)
    then.check(width > 0) { "width: must be above 0" }
    val outcome = Outcome(
        then.int("steps", 1L..1000).toInt(), width, range(then, "guidance_until", 0.0, 1.0, 1.0), then.flag("tile"), then.flag("upscaler"),
        then.flag("refiner"), range(then, "cool_down_s", 0.0, 3600.0, 0.0),
    )
    return PolicyRow(f.text("name", pattern = WORD), f.int("level", 0L..63).toInt(), When(conditions(f, f.map("when"))), outcome, sentence(f, "reason"))
}

private fun conditions(f: Fields, raw: Map<String, Any?>): Map<String, Any> {
    only(raw, "when", *NOMINAL.keys.toTypedArray())
    return NOMINAL.keys.filter { raw[it] != null }.associateWith { axis ->
        val told = raw[axis]
        f.check(told is List<*> && told.isNotEmpty()) { "$axis: must be a list" }
        val items = told as List<*>
        if (axis in SETS) {
            val good = if (axis == "thermal") items.all { it in THERMAL } else items.size <= 2 && items.all { it is Boolean }
            f.check(good) { "$axis: has a value that is none" }
            items.filterNotNull().toSet()
        } else {
            f.check(items.size == 2 && items[0] != null) { "$axis: must be [low, high]" }
            val low = f.checkedNumber(axis, items[0])
            val high = items[1]?.let { f.checkedNumber(axis, it) }
            f.check(low in 0.0..UNBOUNDED && (high == null || high in 0.0..UNBOUNDED && low <= high)) { "$axis: is empty or out of range" }
            Interval(low, high)
        }
    }
}
