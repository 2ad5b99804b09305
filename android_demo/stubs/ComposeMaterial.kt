@file:Suppress("unused", "UNUSED_PARAMETER", "PackageDirectoryMismatch")

package androidx.compose.material3

import androidx.compose.foundation.layout.RowScope
import androidx.compose.runtime.Composable
import androidx.compose.ui.Modifier
import androidx.compose.ui.graphics.Color

class ColorScheme(val error: Color, val onSurface: Color)

object MaterialTheme { val colorScheme: ColorScheme @Composable get() = throw NotImplementedError() }

@Composable
fun MaterialTheme(content: @Composable () -> Unit) = Unit

@Composable
fun Surface(modifier: Modifier = Modifier, content: @Composable () -> Unit) = Unit

@Composable
fun Text(text: String, modifier: Modifier = Modifier, color: Color = Color()) = Unit

@Composable
fun Button(onClick: () -> Unit, modifier: Modifier = Modifier, enabled: Boolean = true, content: @Composable RowScope.() -> Unit) = Unit

@Composable
fun TextButton(onClick: () -> Unit, modifier: Modifier = Modifier, enabled: Boolean = true, content: @Composable RowScope.() -> Unit) = Unit

@Composable
fun Checkbox(checked: Boolean, onCheckedChange: ((Boolean) -> Unit)?, modifier: Modifier = Modifier) = Unit

@Composable
fun LinearProgressIndicator(modifier: Modifier = Modifier) = Unit

@Composable
fun LinearProgressIndicator(progress: () -> Float, modifier: Modifier = Modifier) = Unit

@Composable
fun OutlinedTextField(value: String, onValueChange: (String) -> Unit, modifier: Modifier = Modifier, label: @Composable (() -> Unit)? = null) = Unit
