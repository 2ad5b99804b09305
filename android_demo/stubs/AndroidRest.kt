@file:Suppress("unused", "UNUSED_PARAMETER", "PackageDirectoryMismatch")

package android.graphics

class Bitmap {
    enum class Config { ARGB_8888 }
    companion object { fun createBitmap(colours: IntArray, width: Int, height: Int, config: Config) = Bitmap() }
}
