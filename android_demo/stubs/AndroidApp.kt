@file:Suppress("unused", "UNUSED_PARAMETER", "PackageDirectoryMismatch")

package android.app

import android.content.Context
import android.content.Intent
import android.os.IBinder

class ActivityManager {
    class MemoryInfo {
        @JvmField var availMem = 0L
        @JvmField var threshold = 0L
    }
    fun getMemoryInfo(info: MemoryInfo) = Unit
}
class Notification {
    class Builder(context: Context, channel: String) {
        fun setContentTitle(title: CharSequence) = this
        fun setSmallIcon(icon: Int) = this
        fun setOngoing(ongoing: Boolean) = this
        fun addAction(action: Action) = this
        fun build() = Notification()
    }
    class Action {
        class Builder(icon: android.graphics.drawable.Icon?, title: CharSequence, intent: PendingIntent) { fun build() = Action() }
    }
}
class NotificationChannel(id: String, name: CharSequence, importance: Int)
class NotificationManager {
    fun createNotificationChannel(channel: NotificationChannel) = Unit
    companion object { const val IMPORTANCE_LOW = 2 }
}
class PendingIntent {
    companion object {
        const val FLAG_IMMUTABLE = 1
        fun getService(context: Context, code: Int, intent: Intent, flags: Int) = PendingIntent()
    }
}
abstract class Service : Context() {
    abstract fun onBind(intent: Intent?): IBinder?
    open fun onStartCommand(intent: Intent?, flags: Int, startId: Int): Int = 0
    fun startForeground(id: Int, note: Notification) = Unit
    fun startForeground(id: Int, note: Notification, type: Int) = Unit
    fun stopSelf() = Unit
    companion object { const val START_NOT_STICKY = 2 }
}
open class Activity : Context() {
    fun startActivity(intent: Intent) = Unit
    protected open fun onCreate(state: android.os.Bundle?) = Unit
    open fun onTrimMemory(level: Int) = Unit
}
