/** Keeps the app alive while it draws in the background, with a notification that can cancel. */
package edgesd.app

import android.app.Notification
import android.app.NotificationChannel
import android.app.NotificationManager
import android.app.PendingIntent
import android.app.Service
import android.content.Context
import android.content.Intent
import android.content.pm.ServiceInfo
import android.os.Build
import android.os.IBinder
import edgesd.runtime.Settings

private const val CHANNEL = "drawing"
private const val NOTE = 1
private const val CANCEL = "cancel"

class DrawService : Service() {
    override fun onBind(intent: Intent?): IBinder? = null

    override fun onStartCommand(intent: Intent?, flags: Int, startId: Int): Int {
        val studio = Studio.of(this)
        if (intent?.action == CANCEL) {
            studio.cancel()
            return START_NOT_STICKY
        }
        val note = note()
        if (Build.VERSION.SDK_INT >= 34) startForeground(NOTE, note, ServiceInfo.FOREGROUND_SERVICE_TYPE_SPECIAL_USE) else startForeground(NOTE, note)
        val (settings, policy) = asked ?: return START_NOT_STICKY.also { stopSelf() }
        asked = null
        studio.draw(settings, policy) { stopSelf() }
        return START_NOT_STICKY // a picture whose process died is not drawn behind the user's back
    }

    private fun note(): Notification {
        val manager = getSystemService(NotificationManager::class.java)
        manager.createNotificationChannel(NotificationChannel(CHANNEL, "Drawing", NotificationManager.IMPORTANCE_LOW))
        val cancel = PendingIntent.getService(this, 0, Intent(this, DrawService::class.java).setAction(CANCEL), PendingIntent.FLAG_IMMUTABLE)
        return Notification.Builder(this, CHANNEL).setContentTitle("Drawing a picture").setSmallIcon(android.R.drawable.ic_menu_gallery)
            .setOngoing(true).addAction(Notification.Action.Builder(null, "Cancel", cancel).build()).build()
    }

    companion object {
        @Volatile private var asked: Pair<Settings, String?>? = null

        fun start(context: Context, settings: Settings, policy: String?) {
            asked = settings to policy
            context.startForegroundService(Intent(context, DrawService::class.java))
        }
    }
}
