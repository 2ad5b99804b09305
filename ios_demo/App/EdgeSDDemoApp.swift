import SwiftUI

@main
struct EdgeSDDemoApp: App {
    @StateObject private var library = Library()
    @StateObject private var studio = Studio()
    @Environment(\.scenePhase) private var phase

    var body: some Scene {
        WindowGroup {
            TabView {
                DrawView().tabItem { Label("Draw", systemImage: "paintbrush") }
                PolicyView().tabItem { Label("Policy", systemImage: "thermometer.medium") }
                SelfTestView().tabItem { Label("Self-test", systemImage: "checkmark.seal") }
                ModelsView().tabItem { Label("Models", systemImage: "shippingbox") }
            }
            .environmentObject(library)
            .environmentObject(studio)
            .onChange(of: phase) { _, now in studio.sceneBecame(active: now == .active, background: now == .background) }
            .onReceive(NotificationCenter.default.publisher(for: UIApplication.didReceiveMemoryWarningNotification)) { _ in
                studio.memoryWarning()
            }
        }
    }
}
