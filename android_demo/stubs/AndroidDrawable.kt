@file:Suppress("unused", "PackageDirectoryMismatch")

package android.graphics.drawable

class Icon
