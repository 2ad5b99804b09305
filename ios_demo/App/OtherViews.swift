import EdgeSD
import SwiftUI
import UniformTypeIdentifiers

/// Which policy is in charge, what it decided last, and why.
struct PolicyView: View {
    @EnvironmentObject private var studio: Studio

    var body: some View {
        NavigationStack {
            Form {
                Picker("Policy", selection: $studio.policy) {
                    Text("None").tag(String?.none)
                    ForEach(studio.bundle?.policyNames ?? Policy.shipped, id: \.self) { Text($0).tag(String?.some($0)) }
                }
                TimelineView(.periodic(from: .now, by: 2)) { _ in state(studio.sensors.latest.now()) }
                if let decision = studio.decision { told(decision) }
                if !studio.changes.isEmpty {
                    Section("Changed in this picture") {
                        ForEach(Array(studio.changes.enumerated()), id: \.offset) { Text($0.element.told) }
                    }
                }
            }
            .navigationTitle("Policy")
        }
    }

    private func state(_ now: DeviceState) -> some View {
        Section("This device") {
            LabeledContent("Heat", value: now.thermal)
            LabeledContent("Battery", value: now.battery.map { "\(Int($0 * 100)) %" } ?? "not known")
            LabeledContent("Charging", value: now.charging.map { $0 ? "yes" : "no" } ?? "not known")
            LabeledContent("Low power mode", value: now.saver == true ? "on" : "off")
            LabeledContent("Memory left", value: "\(Int(now.freeMemoryBytes ?? 0) >> 20) MB")
        }
    }

    private func told(_ decision: Decision) -> some View {
        Section("Decision") {
            Text(decision.reason)
            LabeledContent("Row", value: "\(decision.row), level \(decision.level)")
            LabeledContent("Steps", value: "\(decision.steps)")
            LabeledContent("Width", value: String(format: "%g", decision.width))
            LabeledContent("Guidance until", value: "\(Int(decision.guidanceUntil * 100)) %")
            if !decision.capped.isEmpty { LabeledContent("Not given as wanted", value: decision.capped.joined(separator: ", ")) }
            if !decision.assumed.isEmpty { LabeledContent("Not known, taken as well", value: decision.assumed.joined(separator: ", ")) }
        }
    }
}

/// The bundle's golden vectors on this device, in the order that makes the first difference name its cause.
struct SelfTestView: View {
    @EnvironmentObject private var studio: Studio

    var body: some View {
        NavigationStack {
            List {
                ForEach(studio.results) { result in
                    LabeledContent {
                        Text(result.decibels.map { String(format: "%.1f dB", $0) } ?? (result.passed ? "equal" : "different"))
                        if let gate = result.gate { Text(String(format: "of %.0f", gate)).font(.footnote) }
                    } label: {
                        Label(result.name, systemImage: result.passed ? "checkmark.circle" : "xmark.octagon")
                            .foregroundStyle(result.passed ? .green : .red)
                    }
                }
                if studio.phase == .testing { ProgressView() }
                Button("Run", action: studio.selfTest).disabled(studio.phase != .ready)
            }
            .navigationTitle("Self-test")
        }
    }
}

/// The models here, and the ways to get one.
struct ModelsView: View {
    @EnvironmentObject private var library: Library
    @EnvironmentObject private var studio: Studio
    @State private var choosing = false
    @AppStorage("address") private var address = ""

    var body: some View {
        NavigationStack {
            List {
                Section("On this device") {
                    ForEach(library.bundles, id: \.self) { bundle in
                        Button(bundle.lastPathComponent) { studio.open(bundle) }
                    }
                    .onDelete { $0.map { library.bundles[$0] }.forEach(library.remove) }
                    if case .opening(let what) = studio.phase { ProgressView(what) }
                }
                Section("Get one") {
                    Button("Import a bundle's folder from Files") { choosing = true }
                    TextField("https://…/shapes-coreml.edgesd", text: $address).textInputAutocapitalization(.never).autocorrectionDisabled()
                    Button("Download, or go on with it") { library.download(address) }.disabled(address.isEmpty || library.progress != nil)
                    if let (done, total) = library.progress {
                        ProgressView(value: Double(done), total: Double(max(total, 1))) { Text("\(done >> 20) of \(total >> 20) MB") }
                        Button("Stop", role: .cancel, action: library.stop)
                    }
                }
            }
            .navigationTitle("Models")
            .fileImporter(isPresented: $choosing, allowedContentTypes: [.folder]) { chosen in
                if case .success(let folder) = chosen { library.importFolder(folder) }
            }
            .alert("Model", isPresented: .constant(library.problem != nil)) {
                Button("OK") { library.problem = nil }
            } message: { Text(library.problem ?? "") }
        }
    }
}
