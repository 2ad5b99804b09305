@file:Suppress("unused", "UNUSED_PARAMETER", "PackageDirectoryMismatch")

package android.content

import android.net.Uri
import java.io.File
import java.io.InputStream
import java.io.OutputStream

abstract class Context {
    fun <T> getSystemService(kind: Class<T>): T = throw NotImplementedError()
    val filesDir: File get() = throw NotImplementedError()
    val applicationContext: Context get() = this
    val contentResolver: ContentResolver get() = throw NotImplementedError()
    fun startForegroundService(intent: Intent): Any? = null
}
class Intent(action: String) {
    constructor(context: Context, kind: Class<*>) : this("")
    val action: String? get() = null
    fun setAction(action: String) = this
    fun setType(type: String) = this
    fun putExtra(name: String, value: Uri) = this
    fun addFlags(flags: Int) = this
    companion object {
        const val ACTION_SEND = ""
        const val EXTRA_STREAM = ""
        const val FLAG_GRANT_READ_URI_PERMISSION = 1
        fun createChooser(intent: Intent, title: CharSequence?) = intent
    }
}
class ContentValues { fun put(key: String, value: String) = Unit }
abstract class ContentResolver {
    fun openInputStream(uri: Uri): InputStream? = null
    fun openOutputStream(uri: Uri): OutputStream? = null
    fun insert(uri: Uri, values: ContentValues): Uri? = null
}
interface ComponentCallbacks2 { companion object { const val TRIM_MEMORY_BACKGROUND = 40 } }
