import EdgeSD
import Foundation

/// SwiftUI has a Settings of its own; files that import it use this name.
typealias PictureSettings = EdgeSD.Settings

/// The bundles on this device, and how they get here: from Files, or from the web with resume.
@MainActor
final class Library: ObservableObject {
    @Published private(set) var bundles: [URL] = []
    @Published private(set) var progress: (done: Int, total: Int)?
    @Published var problem: String?
    private var task: Task<Void, Never>?

    nonisolated static let support = FileManager.default.urls(for: .applicationSupportDirectory, in: .userDomainMask)[0]
    nonisolated static let models = support.appendingPathComponent("models")

    init() {
        var place = Library.models
        try? FileManager.default.createDirectory(at: place, withIntermediateDirectories: true)
        var values = URLResourceValues()
        values.isExcludedFromBackup = true  // gigabytes that can be fetched again
        try? place.setResourceValues(values)
        refresh()
    }

    func refresh() {
        let found = (try? FileManager.default.contentsOfDirectory(at: Library.models, includingPropertiesForKeys: nil)) ?? []
        bundles = found.filter { !$0.lastPathComponent.hasPrefix(".") }.sorted { $0.path < $1.path }
    }

    /// A folder chosen in Files: copied, checked file by file, shown when whole.
    func importFolder(_ folder: URL) {
        get(folder.lastPathComponent, Download.fromFolder(folder)) {
            let open = folder.startAccessingSecurityScopedResource()
            return { if open { folder.stopAccessingSecurityScopedResource() } }
        }
    }

    /// The address of a bundle's folder. What came before an interruption is kept.
    func download(_ address: String) {
        guard let url = URL(string: address), url.scheme == "https" || url.scheme == "http", !url.lastPathComponent.isEmpty else {
            problem = "\(address) is no address. Allowed: the https address of a bundle's folder. Correct it."
            return
        }
        get(url.lastPathComponent, Download.fromWeb(url)) { {} }
    }

    func stop() { task?.cancel() }

    func remove(_ bundle: URL) {
        try? FileManager.default.removeItem(at: bundle)
        refresh()
    }

    private func get(_ name: String, _ fetch: @escaping Download.Fetch, _ access: @escaping () -> () -> Void) {
        guard task == nil else { return }
        let place = Library.models.appendingPathComponent(name.hasPrefix(".") ? "model" + name : name)
        progress = (0, 1)
        task = Task {
            let release = access()
            do {
                _ = try await Task.detached { [weak self] in
                    try await Download(fetch: fetch).run(to: place) { done, total in
                        Task { @MainActor in self?.progress = (done, total) }
                    }
                }.cancellable()
            } catch is CancellationError {
            } catch {
                problem = "\(error)"
            }
            release()
            (task, progress) = (nil, nil)
            refresh()
        }
    }
}

extension Task where Failure == Error {
    /// The value of a detached task, cancelled with the one that waits for it.
    func cancellable() async throws -> Success {
        try await withTaskCancellationHandler { try await value } onCancel: { cancel() }
    }
}
