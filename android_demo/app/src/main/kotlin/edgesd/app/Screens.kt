/** The three screens, drawn from the state of [Studio]. */
package edgesd.app

import android.graphics.Bitmap
import androidx.compose.foundation.Image
import androidx.compose.foundation.horizontalScroll
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.Row
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.layout.safeDrawingPadding
import androidx.compose.foundation.rememberScrollState
import androidx.compose.foundation.verticalScroll
import androidx.compose.material3.Button
import androidx.compose.material3.Checkbox
import androidx.compose.material3.LinearProgressIndicator
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.OutlinedTextField
import androidx.compose.material3.Surface
import androidx.compose.material3.Text
import androidx.compose.material3.TextButton
import androidx.compose.runtime.Composable
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.remember
import androidx.compose.runtime.setValue
import androidx.compose.ui.Modifier
import androidx.compose.ui.graphics.asImageBitmap
import androidx.compose.ui.layout.ContentScale
import androidx.compose.ui.unit.dp
import edgesd.Rgb
import edgesd.runtime.Settings
import edgesd.short
import java.nio.file.Path

@Composable
fun App(studio: Studio, onImport: () -> Unit, onDraw: (Settings, String?) -> Unit, onShare: (Path) -> Unit) = MaterialTheme {
    var screen by remember { mutableStateOf("Models") }
    Surface {
        Column(Modifier.safeDrawingPadding().padding(16.dp).verticalScroll(rememberScrollState())) {
            Row { for (name in listOf("Models", "Draw", "Self-test")) TextButton(onClick = { screen = name }) { Text(name) } }
            studio.error?.let { Text(it, color = MaterialTheme.colorScheme.error) }
            studio.work?.let { Progress(it, studio::cancel) }
            when (screen) {
                "Models" -> Models(studio, onImport)
                "Draw" -> Draw(studio, onDraw, onShare)
                else -> SelfTest(studio)
            }
        }
    }
}

@Composable
private fun Progress(work: Work, onCancel: () -> Unit) {
    Text("${work.what} ${work.note}")
    val share = work.share
    if (share == null) LinearProgressIndicator(Modifier.fillMaxWidth()) else LinearProgressIndicator({ share }, Modifier.fillMaxWidth())
    TextButton(onClick = onCancel) { Text("Cancel") }
}

@Composable
private fun Models(studio: Studio, onImport: () -> Unit) {
    var url by remember { mutableStateOf("") }
    var gpu by remember { mutableStateOf(false) }
    val free = studio.work == null
    Row {
        Checkbox(gpu, { gpu = it })
        Text("Use the GPU where the model has a variant for it")
    }
    for (name in studio.installed) Row {
        Button(onClick = { studio.open(name, gpu) }, enabled = free) { Text(if (studio.bundle?.folder?.fileName.toString() == name) "$name (open)" else name) }
        TextButton(onClick = { studio.delete(name) }, enabled = free) { Text("Delete") }
    }
    studio.bundle?.let { Text("${it.manifest.model.name}, ${it.manifest.files.sumOf { file -> file.bytes } shr 20} MB, licence ${it.manifest.licence}") }
    Button(onClick = onImport, enabled = free) { Text("Import a zip") }
    OutlinedTextField(url, { url = it }, Modifier.fillMaxWidth(), label = { Text("Address of a bundle's folder") })
    Button(onClick = { studio.download(url) }, enabled = free && url.isNotBlank()) { Text("Download") }
}

@Composable
private fun Draw(studio: Studio, onDraw: (Settings, String?) -> Unit, onShare: (Path) -> Unit) {
    val pipeline = studio.pipeline ?: return Text("Open a model first.")
    var prompt by remember(pipeline) { mutableStateOf(pipeline.bank?.prompts?.firstOrNull() ?: "") }
    var negative by remember(pipeline) { mutableStateOf("") }
    var seed by remember(pipeline) { mutableStateOf("0") }
    var steps by remember(pipeline) { mutableStateOf(pipeline.spec.defaults.steps.toString()) }
    var guidance by remember(pipeline) { mutableStateOf(short(pipeline.spec.defaults.guidance)) }
    var sampler by remember(pipeline) { mutableStateOf(pipeline.spec.defaults.sampler) }
    var policy by remember(pipeline) { mutableStateOf<String?>(null) }
    val whole = Modifier.fillMaxWidth()
    pipeline.bank?.prompts?.filter { it.isNotEmpty() }?.forEach { known -> TextButton(onClick = { prompt = known }) { Text(known) } }
    OutlinedTextField(prompt, { prompt = it }, whole, label = { Text("Prompt") })
    OutlinedTextField(negative, { negative = it }, whole, label = { Text("Not this") })
    OutlinedTextField(seed, { seed = it }, whole, label = { Text("Seed") })
    OutlinedTextField(steps, { steps = it }, whole, label = { Text("Steps, one of ${pipeline.steps(sampler).let { "${it.first()} to ${it.last()}" }}") })
    OutlinedTextField(guidance, { guidance = it }, whole, label = { Text("Guidance") })
    Choice("Sampler", pipeline.samplers.toList(), sampler) { sampler = it }
    Choice("Policy", listOf("none") + pipeline.policyNames, policy ?: "none") { policy = it.takeIf { name -> name != "none" } }
    val settings = studio.defaults(prompt.ifBlank { "x" }, seed.toLongOrNull()?.takeIf { it >= 0 } ?: 0)?.copy(
        negativePrompt = negative, steps = steps.toIntOrNull() ?: 0, guidanceScale = guidance.toDoubleOrNull() ?: -1.0, sampler = sampler,
    )
    Button(onClick = { settings?.let { onDraw(it.copy(prompt = prompt), policy) } }, enabled = studio.work == null) { Text("Draw") }
    studio.shown?.let { Image(bitmap(it).asImageBitmap(), prompt, whole, contentScale = ContentScale.FillWidth) }
    studio.picture?.let { made ->
        Text("seed ${made.settings.seed}, ${made.stepsRun} steps of ${made.settings.sampler}, ${made.calls} UNet calls")
        if (made.truncated.isNotEmpty()) Text("cut off, did not fit: ${made.truncated}")
        for (note in made.notes) Text(note)
    }
    studio.saved?.let { path -> Button(onClick = { onShare(path) }) { Text("Save and share") } }
}

@Composable
private fun Choice(what: String, names: List<String>, chosen: String, onChoose: (String) -> Unit) {
    Text("$what: $chosen")
    Row(Modifier.horizontalScroll(rememberScrollState())) { for (name in names) TextButton(onClick = { onChoose(name) }, enabled = name != chosen) { Text(name) } }
}

@Composable
private fun SelfTest(studio: Studio) {
    Button(onClick = studio::runSelfTest, enabled = studio.work == null && studio.pipeline != null) { Text("Repeat the recorded run") }
    for (finding in studio.findings) {
        val db = finding.db?.let { "${short(Math.round(it * 10) / 10.0)} dB" } ?: ""
        val gate = finding.gate?.let { " (at least ${short(it)} dB)" } ?: ""
        Text("${if (finding.good) "passed" else "FAILED"}  ${finding.what} $db$gate", color = if (finding.good) MaterialTheme.colorScheme.onSurface else MaterialTheme.colorScheme.error)
    }
}

private fun bitmap(image: Rgb): Bitmap {
    val colours = IntArray(image.height * image.width) { i ->
        val (y, x) = i / image.width to i % image.width
        (255 shl 24) or (image[y, x, 0] shl 16) or (image[y, x, 1] shl 8) or image[y, x, 2]
    }
    return Bitmap.createBitmap(colours, image.width, image.height, Bitmap.Config.ARGB_8888)
}
