@file:Suppress("unused", "PackageDirectoryMismatch")

package android.net

abstract class Uri { val lastPathSegment: String? get() = null }
