@file:Suppress("unused", "UnusedReceiverParameter", "PackageDirectoryMismatch")

package androidx.compose.ui.graphics

class Color

interface ImageBitmap

fun android.graphics.Bitmap.asImageBitmap(): ImageBitmap = throw NotImplementedError()
