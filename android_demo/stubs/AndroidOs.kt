@file:Suppress("unused", "UNUSED_PARAMETER", "PackageDirectoryMismatch")

package android.os

class Bundle
interface IBinder
object Build { object VERSION { val SDK_INT = 36 } }
object SystemClock { fun elapsedRealtime() = 0L }
class BatteryManager {
    fun getIntProperty(id: Int) = 0
    val isCharging get() = false
    companion object { const val BATTERY_PROPERTY_CAPACITY = 4 }
}
class PowerManager {
    val isPowerSaveMode get() = false
    val currentThermalStatus get() = 0
    fun getThermalHeadroom(seconds: Int) = 0f
    val thermalHeadroomThresholds: Map<Int, Float> get() = emptyMap()
    companion object {
        const val THERMAL_STATUS_LIGHT = 1
        const val THERMAL_STATUS_SEVERE = 3
        const val THERMAL_STATUS_CRITICAL = 4
    }
}
