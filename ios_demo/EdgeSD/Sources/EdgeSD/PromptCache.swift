import Foundation

/// Prompt embeddings kept for the next picture: in memory up to a byte limit, and in a folder if one is given
/// (edgesd/runtime/cache.py). It never fails a picture: what cannot be stored or read is computed anew.
public final class PromptCache: @unchecked Sendable {
    private let maxBytes, maxDiskBytes: Int
    private let folder: URL?
    private let lock = NSRecursiveLock()
    /// Least recently used first.
    private var entries: [(key: String, array: Tensor)] = []

    public init(maxBytes: Int = 64 << 20, folder: URL? = nil, maxDiskBytes: Int = 256 << 20) {
        (self.maxBytes, self.folder, self.maxDiskBytes) = (maxBytes, folder, maxDiskBytes)
    }

    /// 64 hex digits for a text as one component of one model reads it.
    static func key(model: String, component: String, text: String) -> String {
        Sha256.hex(Json.array([.string(model), .string(component), .string(text)]).dumped.utf8)
    }

    func get(_ key: String, _ compute: () throws -> Tensor) rethrows -> Tensor {
        lock.lock()
        defer { lock.unlock() }
        let place = entries.firstIndex { $0.key == key }
        let found = place.map { entries.remove(at: $0).array } ?? read(key)
        let array = try found ?? compute()
        if found == nil { store(key, array) }
        entries.append((key, array))
        while entries.reduce(0, { $0 + 4 * $1.array.count }) > maxBytes { entries.removeFirst() }
        return array
    }

    /// Gives the memory back, at a memory warning.
    public func forget() {
        lock.lock()
        defer { lock.unlock() }
        entries = []
    }

    private func path(_ key: String) -> URL? { folder?.appendingPathComponent("\(key).safetensors") }

    private func read(_ key: String) -> Tensor? {
        guard let path = path(key), let data = try? Files.read(path.path, limit: maxDiskBytes) else { return nil }
        guard let file = try? Safetensors(parsing: data), let states = file.tensors["states"]?.f32,
            file.tensors["seal"]?.u8?.values == PromptCache.seal(key, states)
        else {
            try? FileManager.default.removeItem(at: path)
            return nil
        }
        try? FileManager.default.setAttributes([.modificationDate: Date()], ofItemAtPath: path.path)
        return states
    }

    private func store(_ key: String, _ array: Tensor) {
        guard let path = path(key), let folder else { return }
        let file = Safetensors(["states": .f32(array), "seal": .u8(NDArray([32], PromptCache.seal(key, array)))])
        try? FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        try? Files.writeWhole(path, file.dumped())
        evict(folder)
    }

    /// Deletes the files unused for longest until the folder is within its limit.
    private func evict(_ folder: URL) {
        let keys: [URLResourceKey] = [.contentModificationDateKey, .fileSizeKey]
        let files = (try? FileManager.default.contentsOfDirectory(at: folder, includingPropertiesForKeys: keys)) ?? []
        let aged = files.filter { $0.pathExtension == "safetensors" }.map { file -> (URL, Date, Int) in
            let values = try? file.resourceValues(forKeys: Set(keys))
            return (file, values?.contentModificationDate ?? .distantPast, values?.fileSize ?? 0)
        }.sorted { $0.1 < $1.1 }
        var total = aged.reduce(0) { $0 + $1.2 }
        for (file, _, size) in aged where total > maxDiskBytes {
            try? FileManager.default.removeItem(at: file)
            total -= size
        }
    }

    private static func seal(_ key: String, _ array: Tensor) -> [UInt8] {
        var hash = Sha256()
        hash.update(Array("\(key) \(array.shape)".utf8))
        hash.update(array.values.withUnsafeBytes { Array($0) })
        return hash.finish()
    }
}
