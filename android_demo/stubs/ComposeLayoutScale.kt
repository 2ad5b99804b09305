@file:Suppress("unused", "UnusedReceiverParameter", "PackageDirectoryMismatch")

package androidx.compose.ui.layout

interface ContentScale { companion object { val FillWidth: ContentScale get() = throw NotImplementedError() } }
