@file:Suppress("unused", "PackageDirectoryMismatch")

package android.provider

import android.net.Uri

object MediaStore {
    object Images {
        object Media {
            const val DISPLAY_NAME = ""
            const val MIME_TYPE = ""
            val EXTERNAL_CONTENT_URI: Uri get() = throw NotImplementedError()
        }
    }
}
