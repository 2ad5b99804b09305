/** The app: models, drawing, self-test. */
package edgesd.app

import android.content.ComponentCallbacks2
import android.content.Intent
import android.os.Bundle
import android.provider.MediaStore
import android.content.ContentValues
import androidx.activity.ComponentActivity
import androidx.activity.compose.setContent
import androidx.activity.result.contract.ActivityResultContracts
import java.nio.file.Files
import java.nio.file.Path

class MainActivity : ComponentActivity() {
    private lateinit var studio: Studio
    private val pick = registerForActivityResult(ActivityResultContracts.OpenDocument()) { uri ->
        if (uri != null) studio.import(uri.lastPathSegment?.substringAfterLast('/') ?: "model") { checkNotNull(contentResolver.openInputStream(uri)) { "the file is gone" } }
    }
    private val notify = registerForActivityResult(ActivityResultContracts.RequestPermission()) { }

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        studio = Studio.of(this)
        if (android.os.Build.VERSION.SDK_INT >= 33) notify.launch(android.Manifest.permission.POST_NOTIFICATIONS)
        setContent {
            App(studio, onImport = { pick.launch(arrayOf("application/zip")) }, onDraw = { settings, policy -> DrawService.start(this, settings, policy) }, onShare = ::share)
        }
    }

    override fun onTrimMemory(level: Int) {
        super.onTrimMemory(level)
        if (level >= ComponentCallbacks2.TRIM_MEMORY_BACKGROUND) studio.trim()
    }

    /** Into the gallery, byte for byte: the settings travel in the PNG; then the system's own sheet. */
    private fun share(path: Path) {
        val values = ContentValues().apply {
            put(MediaStore.Images.Media.DISPLAY_NAME, path.fileName.toString())
            put(MediaStore.Images.Media.MIME_TYPE, "image/png")
        }
        val uri = contentResolver.insert(MediaStore.Images.Media.EXTERNAL_CONTENT_URI, values) ?: return
        contentResolver.openOutputStream(uri)?.use { Files.copy(path, it) }
        val send = Intent(Intent.ACTION_SEND).setType("image/png").putExtra(Intent.EXTRA_STREAM, uri).addFlags(Intent.FLAG_GRANT_READ_URI_PERMISSION)
        startActivity(Intent.createChooser(send, null))
    }
}
