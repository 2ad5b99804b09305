// Just enough of Android for the Kotlin compiler to check the app's sources without the SDK (android_demo/check.py). Never part of a build.
@file:Suppress("unused", "UNUSED_PARAMETER", "PackageDirectoryMismatch")

package android

object R { object drawable { const val ic_menu_gallery = 0 } }
object Manifest { object permission { const val POST_NOTIFICATIONS = "" } }
