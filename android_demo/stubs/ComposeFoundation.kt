@file:Suppress("unused", "UNUSED_PARAMETER", "UnusedReceiverParameter", "PackageDirectoryMismatch")

package androidx.compose.foundation

import androidx.compose.runtime.Composable
import androidx.compose.ui.Modifier
import androidx.compose.ui.graphics.ImageBitmap
import androidx.compose.ui.layout.ContentScale

class ScrollState

@Composable
fun rememberScrollState() = ScrollState()
fun Modifier.verticalScroll(state: ScrollState): Modifier = this
fun Modifier.horizontalScroll(state: ScrollState): Modifier = this

@Composable
fun Image(bitmap: ImageBitmap, contentDescription: String?, modifier: Modifier = Modifier, contentScale: ContentScale = ContentScale.FillWidth) = Unit
