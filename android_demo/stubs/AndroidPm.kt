@file:Suppress("unused", "PackageDirectoryMismatch")

package android.content.pm

class ServiceInfo { companion object { const val FOREGROUND_SERVICE_TYPE_SPECIAL_USE = 1 } }
