import EdgeSD
import SwiftUI

struct DrawView: View {
    @EnvironmentObject private var studio: Studio

    var body: some View {
        NavigationStack {
            Form {
                if let pipeline = studio.pipeline {
                    PictureSection()
                    words(pipeline)
                    numbers(pipeline)
                } else if case .opening(let what) = studio.phase {
                    ProgressView(what)
                } else {
                    ContentUnavailableView("No model", systemImage: "shippingbox", description: Text("Choose one under Models."))
                }
            }
            .navigationTitle(studio.bundle?.manifest.model.name ?? "edgesd")
            .alert("edgesd", isPresented: .constant(studio.problem != nil)) {
                Button("OK") { studio.problem = nil }
            } message: { Text(studio.problem ?? "") }
        }
    }

    @ViewBuilder private func words(_ pipeline: Pipeline) -> some View {
        Section("Words") {
            if let prepared = pipeline.preparedPrompts {
                Picker("Prompt", selection: $studio.settings.prompt) { ForEach(prepared, id: \.self) { Text($0) } }
            } else {
                TextField("Prompt", text: $studio.settings.prompt, axis: .vertical)
                TextField("Negative prompt", text: $studio.settings.negativePrompt, axis: .vertical)
            }
        }
    }

    @ViewBuilder private func numbers(_ pipeline: Pipeline) -> some View {
        let samplers = studio.bundle?.manifest.samplers.map(\.name) ?? []
        let steps = pipeline.steps(studio.settings.sampler)
        let widths = pipeline.session.widths("unet")
        Section("Numbers") {
            LabeledContent("Seed") {
                TextField("Seed", value: $studio.settings.seed, format: .number.grouping(.never)).multilineTextAlignment(.trailing)
                Button("New", systemImage: "dice") { studio.settings.seed = .random(in: 0..<1 << 32) }.labelStyle(.iconOnly)
            }
            Picker("Sampler", selection: $studio.settings.sampler) { ForEach(samplers, id: \.self) { Text($0) } }
            Picker("Steps", selection: $studio.settings.numInferenceSteps) { ForEach(steps, id: \.self) { Text("\($0)") } }
            LabeledContent("Guidance \(studio.settings.guidanceScale, specifier: "%.1f")") {
                Slider(value: $studio.settings.guidanceScale, in: 1...15, step: 0.5)
            }
            if widths.count > 1 {
                Picker("Width", selection: $studio.settings.width) { ForEach(widths, id: \.self) { Text("\($0, specifier: "%g")") } }
            }
        }
        .onChange(of: studio.settings.sampler) { _, name in
            let offered = pipeline.steps(name)
            if !offered.contains(studio.settings.numInferenceSteps), let near = offered.first { studio.settings.numInferenceSteps = near }
        }
    }
}

/// The picture or its preview, what goes on, and the buttons.
private struct PictureSection: View {
    @EnvironmentObject private var studio: Studio

    var body: some View {
        Section {
            if let image = studio.preview {
                Image(decorative: image, scale: 1).resizable().interpolation(.medium).scaledToFit()
            }
            switch studio.phase {
            case .drawing:
                ProgressView(value: Double(studio.row.done), total: Double(studio.row.of)) {
                    Text("Step \(studio.row.done) of \(studio.row.of)")
                }
                buttons(("Pause", studio.pause), ("Cancel", studio.cancel))
            case .paused:
                Text("Paused after step \(studio.row.done)")
                buttons(("Resume", studio.resume), ("Cancel", studio.cancel))
            default:
                Button("Draw", action: studio.draw).disabled(studio.phase != .ready)
            }
            ForEach(Array(studio.changes.enumerated()), id: \.offset) { Text($0.element.told).font(.footnote) }
            if let picture = studio.picture { ResultView(picture: picture) }
        }
    }

    private func buttons(_ all: (String, () -> Void)...) -> some View {
        HStack {
            ForEach(all, id: \.0) { name, action in
                Button(name, action: action).buttonStyle(.bordered)
            }
        }
    }
}

/// The finished picture's settings, and the PNG that carries them.
private struct ResultView: View {
    @EnvironmentObject private var studio: Studio
    let picture: Picture

    var body: some View {
        let s = picture.settings
        VStack(alignment: .leading) {
            Text("Seed \(String(s.seed)), \(s.sampler), \(picture.stepsRun) steps, guidance \(s.guidanceScale, specifier: "%g"), \(picture.calls) UNet calls")
            if !picture.truncated.isEmpty { Text("Did not fit: \(picture.truncated)").foregroundStyle(.orange) }
            ForEach(picture.notes, id: \.self) { Text($0) }
        }
        .font(.footnote)
        if let png = studio.png { ShareLink("Share the PNG with its settings", item: png) }
    }
}
