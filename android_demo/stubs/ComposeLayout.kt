@file:Suppress("unused", "UNUSED_PARAMETER", "UnusedReceiverParameter", "PackageDirectoryMismatch")

package androidx.compose.foundation.layout

import androidx.compose.runtime.Composable
import androidx.compose.ui.Modifier
import androidx.compose.ui.unit.Dp

interface ColumnScope
interface RowScope

@Composable
fun Column(modifier: Modifier = Modifier, content: @Composable ColumnScope.() -> Unit) = Unit

@Composable
fun Row(modifier: Modifier = Modifier, content: @Composable RowScope.() -> Unit) = Unit
fun Modifier.padding(all: Dp): Modifier = this
fun Modifier.fillMaxWidth(): Modifier = this
fun Modifier.safeDrawingPadding(): Modifier = this
