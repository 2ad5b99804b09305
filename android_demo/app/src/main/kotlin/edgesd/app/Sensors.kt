/** What Android tells of the device, as policies read it. */
package edgesd.app

import android.app.ActivityManager
import android.content.Context
import android.os.BatteryManager
import android.os.Build
import android.os.PowerManager
import android.os.SystemClock
import edgesd.runtime.DeviceState
import edgesd.runtime.THERMAL

private const val SAMPLE_MS = 1000L // Android answers NaN to whoever asks for headroom more often
private const val FORECAST_S = 10

class Sensors(context: Context) {
    private val power = context.getSystemService(PowerManager::class.java)
    private val battery = context.getSystemService(BatteryManager::class.java)
    private val activity = context.getSystemService(ActivityManager::class.java)
    private var readAt = 0L
    private var last: DeviceState? = null

    fun freeMemoryBytes(): Long = ActivityManager.MemoryInfo().also(activity::getMemoryInfo).let { maxOf(0L, it.availMem - it.threshold) }

    @Synchronized
    fun read(): DeviceState {
        val now = SystemClock.elapsedRealtime()
        last?.takeIf { now - readAt < SAMPLE_MS }?.let { return it }
        readAt = now
        val charge = battery.getIntProperty(BatteryManager.BATTERY_PROPERTY_CAPACITY).takeIf { it in 0..100 }?.let { it / 100.0 }
        val headroom = headroom()
        val state = DeviceState(
            battery = charge, charging = battery.isCharging, saver = power.isPowerSaveMode, thermal = thermal(headroom), headroom = headroom,
            freeMemoryBytes = freeMemoryBytes().toDouble(), timeS = now / 1000.0,
        )
        last = state
        return state
    }

    private fun headroom(): Double? {
        if (Build.VERSION.SDK_INT < 30) return null
        return power.getThermalHeadroom(FORECAST_S).takeIf { it.isFinite() && it >= 0 }?.toDouble()
    }

    /** The status now, or the one whose own threshold the forecast headroom has reached (Android 15). */
    private fun thermal(headroom: Double?): String {
        var status = power.currentThermalStatus
        if (Build.VERSION.SDK_INT >= 35 && headroom != null) {
            val reached = power.thermalHeadroomThresholds.entries.filter { headroom >= it.value }.maxOfOrNull { it.key } ?: 0
            status = maxOf(status, minOf(reached, PowerManager.THERMAL_STATUS_SEVERE)) // a forecast alone shuts nothing down
        }
        return THERMAL[
            when {
                status >= PowerManager.THERMAL_STATUS_CRITICAL -> 3
                status >= PowerManager.THERMAL_STATUS_SEVERE -> 2
                status >= PowerManager.THERMAL_STATUS_LIGHT -> 1
                else -> 0
            },
        ]
    }
}
