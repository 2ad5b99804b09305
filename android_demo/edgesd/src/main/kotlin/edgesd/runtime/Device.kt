/** What the device feels like right now (edgesd/runtime/device.py). The app's provider reads Android; tests say what they like. */
package edgesd.runtime

/**
 * One reading; null = not known. battery: 0..1. thermal: nominal, fair, serious, critical or unknown. headroom: 0 cool, 1 where the system
 * throttles. deadlineS: time the whole picture may take. secondsPerCall: of the UNet by width. timeS: a monotonic clock.
 */
data class DeviceState(
    val battery: Double? = null, val charging: Boolean? = null, val saver: Boolean? = null, val thermal: String = "unknown",
    val headroom: Double? = null, val freeMemoryBytes: Double? = null, val deadlineS: Double? = null,
    val secondsPerCall: Map<Double, Double> = emptyMap(), val timeS: Double = 0.0,
) {
    init {
        require(battery == null || battery in 0.0..1.0) { "battery $battery" }
        require(thermal in THERMAL || thermal == "unknown") { "thermal $thermal" }
        require(listOfNotNull(headroom, freeMemoryBytes, deadlineS, timeS).all { it.isFinite() && it >= 0 }) { "a negative reading" }
        require(secondsPerCall.all { (w, s) -> w > 0 && w <= 1 && s > 0 && s.isFinite() }) { "seconds per call" }
    }
}

/** Coolest first. */
val THERMAL = listOf("nominal", "fair", "serious", "critical")

/** Each figure from the first state that knows it; timeS: the latest. */
fun merge(vararg states: DeviceState) = DeviceState(
    states.firstNotNullOfOrNull { it.battery }, states.firstNotNullOfOrNull { it.charging }, states.firstNotNullOfOrNull { it.saver },
    states.firstOrNull { it.thermal != "unknown" }?.thermal ?: "unknown", states.firstNotNullOfOrNull { it.headroom },
    states.firstNotNullOfOrNull { it.freeMemoryBytes }, states.firstNotNullOfOrNull { it.deadlineS },
    states.reversed().fold(emptyMap()) { found, state -> found + state.secondsPerCall }, states.maxOf { it.timeS },
)
