/**
 * Bundles onto the device: unpacked from a zip, or downloaded file by file with resume. Either way the manifest's rules hold before a byte of a
 * file is written, every sha256 is computed, and the bundle appears whole or not at all.
 */
package edgesd

import java.io.IOException
import java.io.InputStream
import java.io.OutputStream
import java.net.HttpURLConnection
import java.net.URL
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.StandardCopyOption.ATOMIC_MOVE
import java.nio.file.StandardOpenOption.APPEND
import java.nio.file.StandardOpenOption.CREATE
import java.util.zip.ZipInputStream

private const val AGAIN = "Get the bundle again from where it came"

/** Called with bytes done and bytes in all; throws to stop. */
typealias Progress = (Long, Long) -> Unit

/** Unpacks a zip of one bundle (its files at the top or in one folder) as [place]. DataError for what is none; nothing is left behind. */
fun unpackBundle(zip: InputStream, place: Path, receipts: Path? = null, progress: Progress = { _, _ -> }): Bundle {
    checkFree(place)
    val part = place.resolveSibling(".${place.fileName}.new")
    deleteTree(part)
    try {
        var done = 0L
        ZipInputStream(zip).use { entries ->
            var prefix: String? = null
            generateSequence { entries.nextEntry }.filter { !it.isDirectory }.forEach { entry ->
                val folder = entry.name.substringBefore('/', "").takeIf { it.endsWith(".edgesd") }?.let { "$it/" } ?: ""
                if (prefix == null) prefix = folder
                val path = entry.name.removePrefix(prefix.orEmpty())
                if (!isRelativePath(path)) throw DataError("'${shown(entry.name, 80)}' in the archive", "relative names of files", AGAIN)
                Files.createDirectories(part.resolve(path).parent)
                Files.newOutputStream(part.resolve(path)).use { out ->
                    copy(entries, out) { read ->
                        done += read
                        if (done > MAX_BUNDLE_BYTES) throw DataError("an archive of more than $MAX_BUNDLE_BYTES bytes", "less", AGAIN)
                        progress(done, -1)
                    }
                }
            }
        }
        return settle(part, place, receipts)
    } catch (error: IOException) {
        throw DataError("the archive does not unpack (${shown(error.message, 120)})", "a zip of one bundle", AGAIN, error)
    } finally {
        deleteTree(part)
    }
}

/**
 * Downloads the bundle at [url] (its folder) as [place]. A download that was cut off goes on where it stopped, checked by each file's sha256.
 * SetupError where the network fails (call again to go on), DataError for a broken or hostile bundle.
 */
fun downloadBundle(url: String, place: Path, receipts: Path? = null, progress: Progress = { _, _ -> }): Bundle {
    checkFree(place)
    if (!url.startsWith("https://") && !url.startsWith("http://")) throw RequestError("the address '${shown(url, 80)}'", "https://…", "Correct it")
    val base = url.trimEnd('/')
    val part = place.resolveSibling(".${place.fileName}.new")
    try {
        Files.createDirectories(part)
        val data = open("$base/$MANIFEST", 0).inputStream.use { it.readUpTo(MAX_MANIFEST_BYTES + 1) }
        val manifest = parseManifest(data)
        val kept = part.resolve(MANIFEST)
        // Another bundle at the same address: its files are not these.
        if (Files.exists(kept) && !Files.readAllBytes(kept).contentEquals(data)) deleteTree(part)
        Files.createDirectories(part)
        writeWhole(kept, data)
        val total = manifest.files.sumOf { it.bytes }
        var before = 0L
        for (entry in manifest.files) {
            fetch("$base/${entry.path.replace(" ", "%20")}", part.resolve(entry.path), entry) { progress(before + it, total) }
            before += entry.bytes
        }
        return settle(part, place, receipts)
    } catch (error: IOException) {
        throw SetupError("the download stopped (${shown(error.message, 120)})", "a network that holds", "Start it again: it goes on from here")
    }
}

private fun fetch(url: String, path: Path, entry: FileEntry, progress: (Long) -> Unit) {
    Files.createDirectories(path.parent)
    var have = if (Files.exists(path)) Files.size(path) else 0L
    if (have > entry.bytes) {
        Files.delete(path)
        have = 0
    }
    if (have < entry.bytes || entry.bytes == 0L) {
        val connection = open(url, have)
        if (have > 0 && connection.responseCode != HttpURLConnection.HTTP_PARTIAL) { // a server that cannot resume begins anew
            Files.delete(path)
            have = 0
        }
        connection.inputStream.use { input ->
            Files.newOutputStream(path, CREATE, APPEND).use { out ->
                copy(input, out) { read ->
                    have += read
                    if (have > entry.bytes) throw DataError("${entry.path} has more than ${entry.bytes} bytes", "the size of its manifest", AGAIN)
                    progress(have)
                }
            }
        }
    }
    if (have != entry.bytes) throw IOException("${entry.path} ended at $have of ${entry.bytes} bytes")
    if (sha256(path) != entry.sha256) {
        Files.delete(path)
        throw DataError("${entry.path} does not have the sha256 of its manifest", "the bytes that were packaged", AGAIN)
    }
}

private fun open(url: String, from: Long): HttpURLConnection {
    val connection = URL(url).openConnection() as HttpURLConnection
    connection.connectTimeout = 20_000
    connection.readTimeout = 60_000
    if (from > 0) connection.setRequestProperty("Range", "bytes=$from-")
    val code = connection.responseCode
    if (code == HttpURLConnection.HTTP_NOT_FOUND) throw DataError("nothing at ${shown(url, 120)}", "a bundle's folder", "Check the address")
    if (code !in 200..299) throw IOException("the server answered $code")
    return connection
}

private fun checkFree(place: Path) {
    if (Files.exists(place)) throw RequestError("${place.fileName} is here already", "a new name", "Delete it first")
}

/** Reads the filled folder with every hash, then moves it in. */
private fun settle(part: Path, place: Path, receipts: Path?): Bundle {
    readBundle(part, verify = true)
    Files.move(part, place, ATOMIC_MOVE)
    return readBundle(place, receipts)
}

fun deleteTree(folder: Path) {
    folder.toFile().deleteRecursively()
}

private fun copy(from: InputStream, to: OutputStream, each: (Int) -> Unit) {
    val buffer = ByteArray(1 shl 16)
    while (true) {
        val read = from.read(buffer)
        if (read < 0) return
        each(read)
        to.write(buffer, 0, read)
    }
}

private fun InputStream.readUpTo(most: Int): ByteArray {
    val out = java.io.ByteArrayOutputStream()
    val buffer = ByteArray(1 shl 16)
    while (out.size() < most) {
        val read = read(buffer, 0, minOf(buffer.size, most - out.size()))
        if (read < 0) break
        out.write(buffer, 0, read)
    }
    return out.toByteArray()
}
