@file:Suppress("unused", "PackageDirectoryMismatch")

package androidx.compose.ui

interface Modifier { companion object : Modifier }
