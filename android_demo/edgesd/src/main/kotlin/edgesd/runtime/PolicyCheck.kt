/**
 * What a policy's table must fulfil, found out by going through every cell that its rows' bounds cut the axes into (edgesd/runtime/policycheck.py):
 * no gap, no row that is never first, one outcome a level, nothing dearer as it gets hotter, emptier, later or fuller.
 */
package edgesd.runtime

import edgesd.DataError
import edgesd.short

private const val MAX_CELLS = 200_000
private val ORDER = mapOf("thermal" to THERMAL, "charging" to listOf(true, false), "saver" to listOf(false, true))
private val MORE_IS_WORSE = setOf("headroom", "seconds_per_call")

/** Throws DataError that names the rows, or returns. */
internal fun check(policy: Policy) {
    if (policy.rows.map { it.name }.toSet().size < policy.rows.size) throw refused(policy, "two rows of one name", "names that tell rows apart")
    checkLevels(policy)
    val axes = policy.axes()
    val values = axes.map { cuts(policy, it) }
    val cells = values.fold(1L) { total, list -> minOf(total * list.size, Int.MAX_VALUE.toLong()) }
    if (cells > MAX_CELLS) throw refused(policy, "more than $MAX_CELLS cells", "fewer bounds or axes")
    val strides = IntArray(axes.size)
    var stride = 1
    for (i in axes.indices.reversed()) {
        strides[i] = stride
        stride *= values[i].size
    }
    val found = (0 until cells.toInt()).map { cell ->
        val at = axes.indices.associate { axes[it] to values[it][cell / strides[it] % values[it].size] }
        policy.match(at) ?: throw refused(policy, "a gap: no row holds at $at", "a row for every state")
    }
    val unreached = policy.rows.firstOrNull { it !in found }
    if (unreached != null) throw refused(policy, "row ${unreached.name} is never reached: rows before it take all it would", "rows in use")
    for (cell in found.indices) for (i in axes.indices) {
        if (cell / strides[i] % values[i].size == values[i].size - 1) continue
        val row = found[cell]
        val worse = found[cell + strides[i]]
        if (worse.level < row.level) {
            throw refused(policy, "row ${worse.name} (level ${worse.level}) follows row ${row.name} (level ${row.level}) as ${axes[i]} gets worse", "a level that never falls")
        }
    }
}

private fun checkLevels(policy: Policy) {
    for ((row, worse) in policy.rows.sortedBy { it.level }.zipWithNext()) {
        if (row.level == worse.level && row.then != worse.then) {
            throw refused(policy, "rows ${row.name} and ${worse.name} of level ${row.level} give different things", "one outcome a level")
        }
        if (cost(worse.then) > cost(row.then)) {
            throw refused(policy, "row ${worse.name} costs ${short(cost(worse.then))}, more than row ${row.name} of a lower level", "a cost that never rises with the level")
        }
        // Each part by itself too: a bundle without narrow widths, or a user's floor, takes one part's saving away.
        fun flag(on: Boolean) = if (on) 1.0 else 0.0
        fun parts(then: Outcome) = listOf(then.steps.toDouble(), then.width, then.guidanceUntil, flag(then.upscaler), flag(then.refiner))
        if (parts(worse.then).zip(parts(row.then)).any { (a, b) -> a > b }) {
            throw refused(policy, "row ${worse.name} of level ${worse.level} raises a part over row ${row.name}", "no part that rises with the level")
        }
    }
}

/** Values to test on an axis, best first. */
private fun cuts(policy: Policy, axis: String): List<Any> {
    ORDER[axis]?.let { return it }
    val end = if (axis == "battery") 1.0 else UNBOUNDED
    val used = policy.rows.mapNotNull { it.whenever.conditions[axis] as? Interval }
    val bounds = used.flatMap { listOfNotNull(it.low, it.high) }.map { minOf(it, end) }.toSet()
    val between = (bounds + 0.0 + end).sorted().zipWithNext { a, b -> (a + b) / 2 }
    // An end of the axis answers like the stretch beside it, unless a condition holds there alone.
    val alone = used.filter { it.low >= end || it.high == 0.0 }.map { minOf(it.low, end) }
    val cuts = (between + (bounds - 0.0 - end) + alone).toSortedSet().toList()
    return if (axis in MORE_IS_WORSE) cuts else cuts.asReversed()
}

private fun refused(policy: Policy, came: String, allowed: String) =
    DataError("policy ${policy.name}: $came", allowed, "Correct the table as docs/policies.md describes")
